//! The machine that is measured: a registry in this process behind a shaped link, hosts with stores of their own, and the
//! block devices that ours are compared with.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use ublkimg_driver::device::{Transport, ublk};
use ublkimg_tests::registry::{Config, TestRegistry};
use ublkimg_tests::start::program::Ublkimg;

/// Everything that measurements share.
pub(crate) struct Machine {
    pub(crate) registry: TestRegistry,
    /// Emptied between measurements.
    pub(crate) work: PathBuf,
    /// What is measured.
    program: PathBuf,
    transport: Transport,
    /// The directory of the programs that measure.
    pub(crate) bin: PathBuf,
    /// OCI layout with the converted images as tags.
    pub(crate) images: PathBuf,
    /// The layout with the tree that is read whole, and its tag there.
    pub(crate) tree: (PathBuf, String),
    pub(crate) rounds: usize,
}

impl Machine {
    /// `program` is the `ublkimg` to measure, if it is not the one beside this program.
    pub(crate) fn new(
        work: PathBuf,
        program: Option<PathBuf>,
        transport: Transport,
        images: PathBuf,
        tree: (PathBuf, String),
        rounds: usize,
    ) -> Result<Self> {
        let bin = std::env::current_exe()?.parent().context("a program without a directory")?.to_owned();
        let program = program.unwrap_or_else(|| bin.join("ublkimg"));
        Ok(Self {
            registry: TestRegistry::start(Config::default())?,
            work,
            program,
            transport,
            bin,
            images,
            tree,
            rounds,
        })
    }

    /// Puts a converted image into the registry; gives its reference by tag and by the digest of its manifest.
    pub(crate) fn load(&self, tag: &str) -> Result<(String, String)> {
        let (dir, of_layout) = if tag == "tree" { (&self.tree.0, self.tree.1.as_str()) } else { (&self.images, tag) };
        let loaded = self.registry.load_layout(dir, Some(of_layout), tag, "v1");
        loaded.with_context(|| format!("no image {of_layout} in {}", dir.display()))?;
        let index = self.registry.manifest(tag, "v1")?.context("the registry lost it")?;
        let index: Value = serde_json::from_slice(&index)?;
        let digest = index["manifests"][0]["digest"].as_str().context("an index without manifests")?;
        Ok((self.registry.reference(tag, "v1"), format!("{}/{tag}@{digest}", self.registry.addr())))
    }

    /// A host with an empty store and no daemon.
    pub(crate) fn host(&self, name: &str) -> Result<Host> {
        let dir = self.work.join(name);
        if dir.exists() {
            std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
        std::fs::create_dir_all(dir.join("store"))?;
        let ublkimg = Ublkimg { program: self.program.clone(), root: dir.join("store"), run_dir: dir.join("run") };
        Ok(Host { dir, transport: self.transport, ublkimg })
    }

    /// Nothing in the page cache that can be had again.
    pub(crate) fn drop_caches() -> Result<()> {
        rustix::fs::sync();
        std::fs::write("/proc/sys/vm/drop_caches", "3").context("the page cache cannot be dropped here")
    }
}

/// A host; its devices are removed and its daemon ends with it.
pub(crate) struct Host {
    pub(crate) dir: PathBuf,
    transport: Transport,
    pub(crate) ublkimg: Ublkimg,
}

impl Host {
    /// `add`: gives the device's path. It is mounted at [`Host::mounted`].
    pub(crate) fn add(&self, reference: &str, name: &str, options: &[&str]) -> Result<PathBuf> {
        let mount = self.mounted(name);
        let mount = mount.to_str().context("a path that is not UTF-8")?;
        let transport = self.transport.to_string();
        let mut all =
            vec!["add", reference, "--name", name, "--mount", mount, "--transport", &transport, "--profile", "none"];
        all.extend(["--no-record"].iter().chain(options));
        let said = self.ublkimg.call(&all)?;
        let (device, _) = said.split_once(' ').with_context(|| format!("add printed {said:?}"))?;
        Ok(device.into())
    }

    /// `add` of an image whose bytes are all there when this returns.
    pub(crate) fn add_full(&self, reference: &str, name: &str, options: &[&str]) -> Result<PathBuf> {
        self.add(reference, name, &[&["--wait", "full"], options].concat())
    }

    pub(crate) fn mounted(&self, name: &str) -> PathBuf {
        self.dir.join("mounts").join(name)
    }

    /// Process ids of guard and server.
    pub(crate) fn processes(&self) -> Result<Vec<u32>> {
        let run_dir = self.ublkimg.run_dir.to_str().context("a path that is not UTF-8")?;
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc")? {
            let entry = entry?;
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.contains(run_dir) && line.contains(" daemon ") {
                found.push(pid);
            }
        }
        ensure!(!found.is_empty(), "no daemon runs for {run_dir}");
        Ok(found)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let outcome = self.ublkimg.call(&["ls", "--json"]).and_then(|said| Ok(serde_json::from_str::<Value>(&said)?));
        let devices = outcome.ok().and_then(|devices| devices.as_array().cloned()).unwrap_or_default();
        for name in devices.iter().filter_map(|device| device["name"].as_str()) {
            if let Err(error) = self.ublkimg.call(&["rm", name]) {
                eprintln!("performance: {error:#}");
            }
        }
        if let Err(error) = self.ublkimg.call(&["daemon", "--stop"]) {
            eprintln!("performance: {error:#}");
        }
    }
}

/// A command that must succeed; gives what it printed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    ensure!(output.status.success(), "{program} {} ended with {}", arguments.join(" "), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// A file as a loop device, as `losetup` makes it by default.
pub(crate) struct Loop(pub(crate) PathBuf);

impl Loop {
    pub(crate) fn new(file: &Path) -> Result<Self> {
        let file = file.to_str().context("a path that is not UTF-8")?;
        Ok(Self(run("losetup", &["-r", "-b", "4096", "-f", "--show", file])?.into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Err(error) = run("losetup", &["-d", &self.0.to_string_lossy()]) {
            eprintln!("performance: {error:#}");
        }
    }
}

/// A mounted image.
pub(crate) struct Mounted(pub(crate) PathBuf);

impl Mounted {
    pub(crate) fn new(source: &Path, directory: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&directory)?;
        let (from, to) = (source.to_string_lossy().into_owned(), directory.to_string_lossy().into_owned());
        // With -i no helper beside mount(2): not a loop device for a file.
        run("mount", &["-i", "-t", "erofs", "-o", "ro", &from, &to])?;
        Ok(Self(directory))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = run("umount", &[&self.0.to_string_lossy()]) {
            eprintln!("performance: {error:#}");
        }
    }
}

/// The ublk target that does nothing.
pub(crate) struct NullTarget {
    process: Child,
    pub(crate) device: PathBuf,
}

impl NullTarget {
    pub(crate) fn new(bin: &Path, size_bytes: u64) -> Result<Self> {
        let program = bin.join("null-target");
        let mut process = Command::new(&program).arg(size_bytes.to_string()).stdout(Stdio::piped()).spawn();
        let stdout = process.as_mut().ok().and_then(|process| process.stdout.take());
        let (process, stdout) = (process?, stdout.context("a process without output")?);
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        ensure!(!line.is_empty(), "{} made no device", program.display());
        Ok(Self { process, device: line.trim_end().into() })
    }
}

impl Drop for NullTarget {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let id = self.device.to_str().and_then(|path| path.strip_prefix("/dev/ublkb")).and_then(|id| id.parse().ok());
        if let Some(Err(error)) = id.map(ublk::delete) {
            eprintln!("performance: {error}");
        }
    }
}

/// The bytes of a device in a file.
pub(crate) fn export(device: &Path, file: &Path) -> Result<u64> {
    let mut from = File::open(device).with_context(|| format!("cannot open {}", device.display()))?;
    let mut to = File::create(file).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(std::io::copy(&mut from, &mut to)?)
}
