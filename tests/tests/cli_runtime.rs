//! `ublkimg-runc` in the place of a runtime, as podman, docker and containerd would call it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use serde_json::{Value, json};
use ublkimg_tests::command::{ublkimg, ublkimg_path};
use ublkimg_tests::host::{Host, wait_until};
use ublkimg_tests::skip;

/// A host with a bundle that has no root, and a runtime behind ours.
struct Fixture {
    host: Host,
    bundle: PathBuf,
    program: &'static str,
    /// The runtime runs in a mount namespace of its own.
    is_apart: bool,
}

impl Fixture {
    /// One for each runtime that is here, in turn.
    fn each(test: impl Fn(&Self)) {
        for program in ["runc", "crun"] {
            if Command::new(program).arg("--version").stdout(Stdio::null()).status().is_err() {
                continue;
            }
            let host = match Host::with_shell() {
                Ok(host) => host,
                Err(reason) => skip!("{reason}"),
            };
            // crun works with either version of cgroups, not with both at once.
            let is_apart = program == "crun" && Path::new("/sys/fs/cgroup/unified").exists();
            let fixture = Self { bundle: host.root.join("b"), host, program, is_apart };
            fixture.prepare();
            test(&fixture);
            fixture.host.end();
        }
    }

    fn prepare(&self) {
        std::os::unix::fs::symlink(ublkimg_path(), self.host.root.join("ublkimg-runc")).unwrap();
        let exec = match self.program {
            "crun" if self.is_apart => {
                "exec unshare --mount --propagation unchanged sh -c 'mount --make-private /sys/fs/cgroup && \
                 umount /sys/fs/cgroup/unified && exec crun \"$@\"' crun \"$@\""
            }
            "crun" => "exec crun \"$@\"",
            _ => "exec runc \"$@\"",
        };
        let chained = self.host.root.join("chained");
        std::fs::write(&chained, format!("#!/bin/sh\n{exec}\n")).unwrap();
        std::fs::set_permissions(&chained, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        // A configuration like that of any tool, and no root.
        let made = self.host.root.join("made").display().to_string();
        let reference = self.host.registry.reference("shell", "v1");
        self.host.ublkimg(&["bundle", &reference, &made, "--name", "made", "--no-hooks", "--", "/bin/sh"]).success();
        std::fs::create_dir(&self.bundle).unwrap();
        std::fs::copy(Path::new(&made).join("config.json"), self.bundle.join("config.json")).unwrap();
        self.host.ublkimg(&["rm", "made"]).success();
    }

    fn configure(&self, reference: &str, command: &[&str]) {
        let path = self.bundle.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config["process"]["args"] = json!(command);
        config["annotations"] = json!({ "dev.ublkimg.image": reference });
        std::fs::write(&path, config.to_string()).unwrap();
    }

    /// Calls the runtime; what it and the container say.
    fn call(&self, words: &[&str]) -> (ExitStatus, String) {
        let root = self.host.root.path();
        let out = root.join("out");
        let file = || std::fs::OpenOptions::new().create(true).append(true).open(&out).unwrap();
        std::fs::write(&out, "").unwrap();
        let status = Command::new(root.join("ublkimg-runc"))
            .arg("--root")
            .arg(root.join("state"))
            .args(words)
            .env("UBLKIMG_CONFIG", "/dev/null")
            .env("UBLKIMG_ROOT", root.join("store"))
            .env("UBLKIMG_RUN_DIR", root.join("run"))
            .env("UBLKIMG_RUNTIME", root.join("chained"))
            .stdin(Stdio::null())
            // Files, not pipes: the daemon that may be started would keep a pipe open.
            .stdout(file())
            .stderr(file())
            .status()
            .unwrap();
        // On a host without ublk it says so.
        let said = std::fs::read_to_string(&out).unwrap();
        (status, said.lines().filter(|line| !line.contains("no ublk here")).map(|line| format!("{line}\n")).collect())
    }

    fn succeeds(&self, words: &[&str]) -> String {
        let (status, text) = self.call(words);
        assert!(status.success(), "{} {words:?}: {text}", self.program);
        text
    }

    fn nothing_is_left(&self) {
        assert_eq!(self.host.devices(), Vec::<Value>::new(), "{}", self.program);
        assert!(!self.bundle.join("ublkimg-rootfs").exists());
    }
}

#[test]
fn the_root_comes_from_the_annotated_image_and_goes_with_the_container() {
    Fixture::each(|fixture| {
        let reference = fixture.host.registry.reference("shell", "v1");
        let bundle = fixture.bundle.display().to_string();
        // Twice: a bundle can be run again.
        for _ in 0..2 {
            let script = "busybox wc -c < /data; echo x > /new && cat /new";
            fixture.configure(&reference, &["/bin/sh", "-c", script]);
            assert_eq!(fixture.succeeds(&["run", "-b", &bundle, "c1"]), "1048576\nx\n");
            if fixture.is_apart {
                // Its hook unmounts in its own mount namespace only: what is left is for `delete`.
                fixture.call(&["delete", "--force", "c1"]);
            }
            fixture.nothing_is_left();
        }
    });
}

#[test]
fn a_container_that_lives_keeps_its_root() {
    Fixture::each(|fixture| {
        let bundle = fixture.bundle.display().to_string();
        fixture.configure(&fixture.host.registry.reference("shell", "v1"), &["/bin/sleep", "300"]);
        fixture.succeeds(&["create", "--bundle", &bundle, "c1"]);
        fixture.succeeds(&["start", "c1"]);
        let name = fixture.host.devices()[0]["name"].as_str().unwrap().to_owned();
        fixture.host.ublkimg(&["rm", &name]).refused(9, &[&name, "c1"]);
        fixture.succeeds(&["delete", "--force", "c1"]);
        fixture.nothing_is_left();
    });
}

#[test]
fn a_container_survives_a_crash_of_the_daemon() {
    if !Path::new("/dev/ublk-control").exists() {
        skip!("this kernel has no ublk, and a FUSE file goes with its server");
    }
    Fixture::each(|fixture| {
        let bundle = fixture.bundle.display().to_string();
        let script = "echo > /up; while [ ! -e /go ]; do busybox sleep 0.1; done; busybox wc -c < /data";
        fixture.configure(&fixture.host.registry.reference("shell", "v1"), &["/bin/sh", "-c", script]);
        let root = fixture.bundle.join("ublkimg-rootfs");
        std::thread::scope(|scope| {
            let container = scope.spawn(|| fixture.succeeds(&["run", "-b", &bundle, "c1"]));
            wait_until("the container runs", || root.join("up").exists());
            fixture.host.kill_server();
            std::fs::write(root.join("go"), "").unwrap();
            assert_eq!(container.join().unwrap(), "1048576\n", "{}", fixture.program);
        });
        if fixture.is_apart {
            fixture.call(&["delete", "--force", "c1"]);
        }
        fixture.nothing_is_left();
    });
}

#[test]
fn failures_are_said_where_callers_look_and_leave_nothing() {
    Fixture::each(|fixture| {
        let bundle = fixture.bundle.display().to_string();
        let log = fixture.host.root.join("log.json");
        let missing = fixture.host.registry.reference("nothing", "v1");
        fixture.configure(&missing, &["/bin/sh"]);
        let log_text = log.display().to_string();
        let words = ["--log", &log_text, "--log-format", "json", "create", "--bundle", &bundle, "c1"];
        let (status, said) = fixture.call(&words);
        assert_eq!(status.code(), Some(3), "{said}");
        let line: Value = serde_json::from_str(std::fs::read_to_string(&log).unwrap().trim()).unwrap();
        assert!(line["level"] == "error" && line["msg"].as_str().unwrap().contains("nothing"), "{line}");
        fixture.nothing_is_left();
        // The runtime itself fails, and whoever called it deletes what is left.
        fixture.configure(&fixture.host.registry.reference("shell", "v1"), &["/bin/nowhere"]);
        let (status, _) = fixture.call(&["create", "--bundle", &bundle, "c1"]);
        if status.success() {
            assert!(!fixture.call(&["start", "c1"]).0.success());
        }
        fixture.call(&["delete", "--force", "c1"]);
        fixture.nothing_is_left();
    });
}

#[test]
fn everything_else_is_the_other_runtime_s() {
    let root = tempfile::tempdir().unwrap();
    let chained = ["/bin/echo", "/usr/bin/echo"].into_iter().find(|path| Path::new(path).exists()).unwrap();
    let call = |program: &str| {
        let command = ublkimg(root.path()).args(["runtime", "--runtime", program, "--", "--version", "kill", "c1"]);
        command.run()
    };
    assert_eq!(call(chained).success().stdout, "--version kill c1\n");
    call("/nonexistent/runtime").refused(3, &["/nonexistent/runtime", "UBLKIMG_RUNTIME"]);
}
