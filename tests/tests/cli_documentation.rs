//! The commands of the documentation, run: what stands in the code blocks of its pages, block by block, with registries that have what
//! the pages speak of. Only names of places are replaced.
//!
//! The tutorial has a run of its own (`tests/tutorial.sh`). What other tools are called with is run where they can be installed:
//! podman in `tests/podman.sh`, docker and Slurm in `tests/recipes.sh`, systemd in `tests/vm/reboot.sh`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::TcpListener;
use std::path::Path;

use ublkimg_tests::command::{shell, ublkimg_path};
use ublkimg_tests::host::Host;
use ublkimg_tests::oci_layout::{Compression, Layer, OciLayout};
use ublkimg_tests::registry::{Config, TestRegistry};
use ublkimg_tests::skip;
use ublkimg_tests::tar::{Entry, LongNames, archive};

/// A block of code: where it begins, its language, and its lines, those that go on put together.
struct Block {
    place: String,
    language: String,
    lines: Vec<String>,
}

fn blocks_of(name: &str) -> Vec<Block> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
    let text = std::fs::read_to_string(path).unwrap().replace("\\\n", "  ");
    let mut blocks: Vec<Block> = Vec::new();
    let mut is_inside = false;
    for (number, line) in (1..).zip(text.lines()) {
        match line.trim_start().strip_prefix("```") {
            Some(_) if is_inside => is_inside = false,
            Some(language) => {
                is_inside = true;
                let place = format!("{name}:{number}");
                blocks.push(Block { place, language: language.to_owned(), lines: Vec::new() });
            }
            None if is_inside => blocks.last_mut().unwrap().lines.push(line.to_owned()),
            None => {}
        }
    }
    blocks
}

impl Block {
    /// What of it is run here: the parts of its command lines that call `ublkimg`, or runc with a bundle of it.
    fn commands(&self) -> Vec<String> {
        let prompt = match self.language.as_str() {
            "console" => "$ ",
            "" => "",
            _ => return Vec::new(),
        };
        let lines = self.lines.iter().filter_map(|line| line.strip_prefix(prompt));
        let is_ours = |part: &&str| part.starts_with("ublkimg ") || part.starts_with("runc run -b");
        lines.flat_map(|line| line.split(" && ")).filter(is_ours).map(str::to_owned).collect()
    }
}

/// `app:1` as somebody built it, a server on `port`, in the layout directory.
fn write_app(layout: &Path, port: u16) -> Result<(), &'static str> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find_map(|path| std::fs::read(path).ok());
    let Some(busybox) = busybox else { return Err("there is no busybox") };
    let script = format!(
        "#!/bin/sh\n[ \"$1\" != serve ] || exec busybox httpd -f -p 127.0.0.1:{port} -h /srv\necho \"app 1, called as $0 $*\"\n"
    );
    let mut entries = vec![
        Entry::file("bin/busybox", busybox).mode(0o755),
        Entry::symlink("bin/sh", "busybox"),
        Entry::file("usr/bin/app", script.clone()).mode(0o755),
        Entry::file("etc/passwd", "root:x:0:0::/:/bin/sh\n"),
        Entry::file("srv/index.html", "it serves\n"),
    ];
    entries.extend(["app", "serve"].map(|name| Entry::file(&format!("bin/{name}"), script.clone()).mode(0o755)));
    let layers = [Layer { tar: archive(&entries, LongNames::Pax), compression: Compression::Gzip }];
    OciLayout::create(layout).and_then(|layout| layout.add_image("v1", &layers)).unwrap();
    Ok(())
}

/// A host on which the commands of a page can be run, and what stands for the names in them.
struct Reader {
    host: Host,
    replaced: Vec<(&'static str, String)>,
    _converted: TestRegistry,
}

impl Reader {
    fn new() -> Result<Self, &'static str> {
        let host = Host::with_shell()?;
        let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).unwrap().port();
        let app = host.root.join("app");
        write_app(&app, port)?;
        // One has the image as it was built, and takes what is made of it; the other has only what was made.
        host.registry.load_layout(&app, Some("v1"), "app", "1").unwrap();
        host.ublkimg(&["convert", &host.registry.reference("app", "1"), &host.registry.reference("app", "1-ublk")])
            .success();
        let made = host.root.join("made");
        let [from, to] = [&app, &made].map(|layout| format!("oci:{}:v1", layout.display()));
        host.ublkimg(&["convert", &from, &to]).success();
        let converted = TestRegistry::start(Config::default()).unwrap();
        for (repository, tag) in [("app", "1"), ("serve", "1"), ("llama", "8b")] {
            converted.load_layout(&made, Some("v1"), repository, tag).unwrap();
        }
        let below = |name: &str| host.root.dir(name).unwrap().display().to_string();
        let (mnt, srv, cdi, images, enroot) =
            (below("mnt"), below("srv"), below("cdi"), below("images.d"), below("enroot"));
        let device =
            "cdiVersion: 0.6.0\nkind: nvidia.com/gpu\ndevices:\n- name: '0'\n  containerEdits:\n    env: [GPU=0]\n";
        host.root.file("cdi/nvidia.yaml", device).unwrap();
        let replaced = vec![
            ("registry.example.com/", format!("{}/", host.registry.addr())),
            ("registry.example/", format!("{}/", converted.addr())),
            ("127.0.0.1:8080", format!("127.0.0.1:{port}")),
            ("/mnt/", format!("{mnt}/")),
            ("/srv/app", format!("{srv}/app")),
            ("/var/run/cdi", cdi),
            ("/etc/ublkimg/images.d", images),
            ("/var/lib/enroot", enroot),
            // Three kinds of starts, each so often.
            ("--rounds 5", "--rounds 1".to_owned()),
        ];
        Ok(Self { host, replaced, _converted: converted })
    }

    fn told(&self, text: &str) -> String {
        self.replaced.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
    }

    /// Runs a line of shell, which must succeed.
    fn run(&self, place: &str, line: &str) {
        let program = ublkimg_path();
        let path = format!("{}:{}", program.parent().unwrap().display(), std::env::var("PATH").unwrap());
        let line = self.told(line);
        println!("{place}: {line}");
        let root = self.host.root.path();
        let outcome = shell(root, &format!("cd {} && {line}", root.display()))
            .env("PATH", path)
            .env("UBLKIMG_CDI_DIR", self.told("/var/run/cdi"))
            .env("UBLKIMG_IMAGES_DIR", self.told("/etc/ublkimg/images.d"))
            .run();
        assert_eq!(outcome.code, Some(0), "{place}: {line}: {}", outcome.stderr);
    }

    /// Runs all of a page; returns how many commands it has.
    fn follow(&self, page: &str) -> usize {
        let mut counted = 0;
        for block in blocks_of(page) {
            // An image that `up` is to add.
            if block.language == "toml" && block.lines.first().is_some_and(|line| line.starts_with("reference = ")) {
                self.host.root.file("images.d/llama.toml", self.told(&block.lines.join("\n"))).unwrap();
            }
            let commands = block.commands();
            for command in &commands {
                self.run(&block.place, command);
            }
            counted += commands.len();
            for device in self.host.devices() {
                self.host.ublkimg(&["rm", device["name"].as_str().unwrap()]).success();
            }
        }
        counted
    }
}

#[test]
fn what_the_pages_say_to_type_works() {
    let reader = match Reader::new() {
        Ok(reader) => reader,
        Err(reason) => skip!("{reason}"),
    };
    let pages =
        ["README.md", "docs/profiles.md", "docs/containers.md", "docs/services.md", "docs/slurm.md", "docs/compare.md"];
    let counted = pages.map(|page| (page, reader.follow(page)));
    assert!(counted.iter().all(|(_page, commands)| *commands > 0), "{counted:?}");
    assert!(counted.iter().map(|(_page, commands)| commands).sum::<usize>() > 20, "{counted:?}");
    reader.host.end();
}
