//! What a hook costs a container whose image is attached already.

use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::machine::{Host, Machine};
use crate::rows::{Bar, Row};

/// What a container may wait for a hook.
const HOOK_MS: f64 = 20.0;

/// So long may a process take to leave this mount namespace.
const NAMESPACE_TIMEOUT: Duration = Duration::from_secs(10);

/// A process with a mount namespace of its own, and what a runtime would say of it.
struct Container {
    process: Child,
    state: Value,
}

impl Container {
    fn new(host: &Host, id: &str, annotations: &Value) -> Result<Self> {
        let bundle = host.dir.join(id);
        std::fs::create_dir_all(bundle.join("rootfs/models"))?;
        std::fs::write(bundle.join("config.json"), r#"{"root": {"path": "rootfs"}}"#)?;
        let mut process = Command::new("unshare");
        process.args(["--mount", "sleep", "600"]).stdin(Stdio::null());
        let process = process.spawn().context("unshare")?;
        let namespace = |of: String| std::fs::read_link(format!("/proc/{of}/ns/mnt"));
        let deadline = Instant::now() + NAMESPACE_TIMEOUT;
        while namespace(process.id().to_string())? == namespace("self".to_owned())? {
            ensure!(Instant::now() < deadline, "unshare made no mount namespace");
            std::thread::sleep(Duration::from_millis(1));
        }
        let state = json!({
            "ociVersion": "1.0.2", "id": id, "status": "created", "pid": process.id(), "bundle": bundle,
            "annotations": annotations,
        });
        Ok(Self { process, state })
    }

    /// Calls the hook as a runtime does; gives how long it took.
    fn hook(&self, host: &Host, phase: &str) -> Result<f64> {
        let began = Instant::now();
        let mut hook = host.ublkimg.command();
        let mut hook = hook.args(["hook", phase]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        hook.stdin.take().context("a process without input")?.write_all(self.state.to_string().as_bytes())?;
        let status = hook.wait()?;
        ensure!(status.success(), "hook {phase} ended with {status}");
        Ok(began.elapsed().as_secs_f64() * 1e3)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) fn measure(machine: &Machine, options: &[&str]) -> Result<Vec<Row>> {
    let (reference, _) = machine.load("sample")?;
    let host = machine.host("hooks")?;
    host.add(&reference, "root", options)?;
    let mounts = json!({ "dev.ublkimg.mount./models": reference });
    // Attaches the image, and keeps it while the others come and go.
    let first = Container::new(&host, "first", &mounts)?;
    first.hook(&host, "createRuntime")?;
    let mut rows = Vec::new();
    for (what, annotations) in [
        ("no image", json!({})),
        ("an attached root", json!({ "dev.ublkimg.root": "root" })),
        ("an attached image, mounted at a path", mounts),
    ] {
        let (mut create, mut stop) = (Vec::new(), Vec::new());
        for round in 0..machine.rounds {
            let container = Container::new(&host, &format!("round-{round}"), &annotations)?;
            create.push(container.hook(&host, "createRuntime")?);
            stop.push(container.hook(&host, "poststop")?);
        }
        let row = Row::of(format!("hook createRuntime, {what}: ms"), create, Bar::AtMost(HOOK_MS));
        rows.push(row.with("poststop", "ms", stop));
    }
    first.hook(&host, "poststop")?;
    Ok(rows)
}
