//! Writable roots, bundles and hooks, as provisioning scripts and runtimes use them, on this machine's kernel.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use ublkimg_tests::command::ublkimg_path;
use ublkimg_tests::host::{Host, wait_until};
use ublkimg_tests::skip;

/// Phases that mount images.
const PHASES: [&str; 2] = ["prestart", "createRuntime"];

/// The runtimes that are here.
fn runtimes() -> Vec<&'static str> {
    let is_there = |name: &&str| Command::new(name).arg("--version").stdout(Stdio::null()).status().is_ok();
    ["runc", "crun"].into_iter().filter(is_there).collect()
}

/// A runtime whose state lies below the host's root.
fn runtime(host: &Host, program: &str) -> Command {
    let is_hybrid = Path::new("/sys/fs/cgroup/unified").exists();
    let mut command = match program {
        // crun works with either version of cgroups, not with both at once.
        "crun" if is_hybrid => {
            let script = "mount --make-private /sys/fs/cgroup && umount /sys/fs/cgroup/unified && exec crun \"$@\"";
            let mut command = Command::new("unshare");
            command.args(["--mount", "--propagation", "unchanged", "sh", "-c", script, "crun"]);
            command
        }
        _ => Command::new(program),
    };
    command.arg("--root").arg(host.root.join(format!("state-{program}")));
    command
}

fn run(host: &Host, program: &str, bundle: &Path, id: &str) -> Output {
    // A file, not a pipe: what a hook starts (the daemon) would keep a pipe open.
    let path = host.root.join("out");
    let file = || std::fs::OpenOptions::new().create(true).append(true).open(&path).unwrap();
    std::fs::write(&path, "").unwrap();
    let status = runtime(host, program)
        .arg("run")
        .arg("-b")
        .arg(bundle)
        .arg(id)
        .stdin(Stdio::null())
        .stdout(file())
        .stderr(file())
        .status()
        .unwrap();
    Output { status, stdout: std::fs::read(&path).unwrap(), stderr: Vec::new() }
}

fn succeeds(host: &Host, program: &str, bundle: &Path, id: &str) -> String {
    let output = run(host, program, bundle, id);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{program}, {}: {text}", output.status);
    text
}

fn start(host: &Host, program: &str, bundle: &Path, id: &str) -> Child {
    let mut command = runtime(host, program);
    command.arg("run").arg("-b").arg(bundle).arg(id).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

fn bundle(host: &Host, name: &str, options: &[&str], command: &[&str]) -> PathBuf {
    let directory = host.root.join(name);
    let reference = host.registry.reference("shell", "v1");
    let first = ["bundle", &reference, directory.to_str().unwrap(), "--name", name];
    let separator = if command.is_empty() { &[][..] } else { &["--"] };
    host.ublkimg(&[&first, options, separator, command].concat()).success();
    directory
}

#[test]
fn a_root_can_be_written_and_goes_without_a_trace() {
    let host = match Host::with_shell() {
        Ok(host) => host,
        Err(reason) => skip!("{reason}"),
    };
    let (mount, text) = (host.root.join("root"), host.root.join("root").display().to_string());
    let arguments = ["--mount", &text, "--overlay", "--name", "web"];
    let added = host.add("shell", &arguments).success();
    assert!(added.stdout.trim_end().ends_with(&text), "{}", added.stdout);
    std::fs::write(mount.join("new"), "x").unwrap();
    std::fs::remove_file(mount.join("data")).unwrap();
    // Again: it is found as it is.
    host.add("shell", &arguments).success();
    assert!(mount.join("new").exists() && !mount.join("data").exists());
    let elsewhere = host.root.join("elsewhere").display().to_string();
    host.add("shell", &["--mount", &elsewhere, "--overlay", "--name", "web"]).refused(9, &["web", &text]);
    assert!(!Path::new(&elsewhere).exists());
    // In use: nothing is taken away.
    let held = std::fs::File::open(mount.join("new")).unwrap();
    host.ublkimg(&["rm", "web"]).refused(9, &[&text]);
    assert!(mount.join("new").exists());
    drop(held);
    host.ublkimg(&["rm", &text]).success();
    assert!(!mount.exists(), "it was made by add");
    host.end();
}

#[test]
fn changes_are_kept_where_the_user_says() {
    let host = match Host::with_shell() {
        Ok(host) => host,
        Err(reason) => skip!("{reason}"),
    };
    let (mount, upper) = (host.root.join("root"), host.root.join("changes"));
    let overlay = format!("--overlay={}", upper.display());
    for round in 0..2 {
        host.add("shell", &["--mount", mount.to_str().unwrap(), &overlay, "--name", "web"]).success();
        assert_eq!(mount.join("kept").exists(), round == 1);
        std::fs::write(mount.join("kept"), "x").unwrap();
        host.ublkimg(&["rm", "web"]).success();
    }
    assert!(upper.join("upper/kept").exists());
    let bad = format!("--overlay={}", host.root.join("a:b").display());
    host.add("shell", &["--mount", mount.to_str().unwrap(), &bad, "--name", "web"]).refused(2, &["colon"]);
    assert!(!mount.exists());
    assert_eq!(host.devices(), Vec::<Value>::new());
    host.end();
}

#[test]
fn a_bundle_is_all_that_a_runtime_needs() {
    let host = match Host::with_shell() {
        Ok(host) => host,
        Err(reason) => skip!("{reason}"),
    };
    for program in runtimes() {
        let script = "busybox id -u; cat /data | busybox wc -c; echo $WHO; echo x > /new && cat /new; pwd";
        let options = ["--env", "WHO=me", "--workdir", "/etc"];
        let directory = bundle(&host, "one", &options, &["/bin/sh", "-c", script]);
        assert_eq!(succeeds(&host, program, &directory, "c1"), "0\n1048576\nme\nx\n/etc\n");
        host.ublkimg(&["rm", "one"]).success();
        assert!(!directory.exists(), "the bundle was made by us");
    }
    let reference = host.registry.reference("shell", "v1");
    // A bundle that is there is not taken away by a command that fails on it.
    let directory = bundle(&host, "one", &[], &["/bin/sh"]).display().to_string();
    let again = ["bundle", &reference, &directory, "--name", "one", "--user", "nobody", "--", "/bin/sh"];
    host.ublkimg(&again).refused(2, &["nobody"]);
    assert!(Path::new(&directory).join("rootfs/data").exists());
    host.ublkimg(&["rm", "one"]).success();
    let directory = host.root.join("two").display().to_string();
    let nobody = ["bundle", &reference, &directory, "--user", "nobody", "--", "/bin/sh"];
    host.ublkimg(&nobody).refused(2, &["nobody"]);
    assert!(!Path::new(&directory).exists());
    assert_eq!(host.devices(), Vec::<Value>::new());
    host.end();
}

#[test]
fn devices_of_the_host_come_as_their_vendor_says() {
    let host = match Host::with_shell() {
        Ok(host) => host,
        Err(reason) => skip!("{reason}"),
    };
    let (cdi, gift, called) = (host.root.join("cdi"), host.root.join("gift"), host.root.join("called"));
    std::fs::create_dir_all(&cdi).unwrap();
    std::fs::create_dir_all(&gift).unwrap();
    std::fs::write(gift.join("library"), "of the host\n").unwrap();
    let text = format!(
        "cdiVersion: 0.6.0\nkind: vendor.test/gpu\ncontainerEdits:\n  env: [VISIBLE=all]\n  hooks:\n  \
         - {{hookName: createRuntime, path: /bin/sh, args: [sh, -c, 'cat > /dev/null; echo called >> {}']}}\n  mounts:\n  \
         - {{hostPath: {}, containerPath: /gift, options: [ro, nosuid, bind]}}\ndevices:\n- name: '0'\n  \
         containerEdits:\n    deviceNodes:\n    - {{path: /dev/gpu0, hostPath: /dev/zero, permissions: r}}\n",
        called.display(),
        gift.display()
    );
    std::fs::write(cdi.join("vendor.yaml"), text).unwrap();
    let cdi_dir = format!("--cdi-dir={}", cdi.display());
    for (round, program) in (1..).zip(runtimes()) {
        let script = "echo $VISIBLE; cat /gift/library; busybox head -c 3 /dev/gpu0 | busybox wc -c";
        let options = [&*cdi_dir, "--device", "vendor.test/gpu=0"];
        let directory = bundle(&host, "one", &options, &["/bin/sh", "-c", script]);
        assert_eq!(succeeds(&host, program, &directory, "c1"), "all\nof the host\n3\n");
        assert_eq!(std::fs::read_to_string(&called).unwrap().lines().count(), round);
        host.ublkimg(&["rm", "one"]).success();
    }
    let (reference, two) = (host.registry.reference("shell", "v1"), host.root.join("two").display().to_string());
    let missing = ["bundle", &reference, &two, &cdi_dir, "--device", "vendor.test/gpu=1"];
    host.ublkimg(&missing).refused(3, &["vendor.test/gpu=1", &cdi.display().to_string()]);
    assert_eq!(host.devices(), Vec::<Value>::new(), "nothing was attached for it");
    host.end();
}

#[test]
fn an_attached_image_is_a_device_for_other_tools() {
    let host = match Host::with_shell() {
        Ok(host) => host,
        Err(reason) => skip!("{reason}"),
    };
    let (cdi, weights) = (host.root.join("cdi"), host.root.join("weights"));
    std::fs::create_dir_all(&cdi).unwrap();
    host.add("shell", &["--mount", weights.to_str().unwrap(), "--name", "weights"]).success();
    let file = cdi.join("weights.json");
    host.ublkimg(&["cdi", "generate", "weights", "--path", "/models", "-o", file.to_str().unwrap()]).success();
    let shown = host.ublkimg(&["cdi", "generate", "weights", "--path", "/models"]).success();
    let written: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(written, serde_json::from_str::<Value>(&shown.stdout).unwrap());
    let cdi_dir = format!("--cdi-dir={}", cdi.display());
    for program in runtimes() {
        let script = "busybox wc -c < /models/data; ! echo x 2>/dev/null > /models/y";
        let options = [&*cdi_dir, "--device", "ublkimg.dev/tree=weights"];
        let directory = bundle(&host, "one", &options, &["/bin/sh", "-c", script]);
        assert_eq!(succeeds(&host, program, &directory, "c1"), "1048576\n");
        host.ublkimg(&["rm", "one"]).success();
    }
    host.add("shell", &["--name", "bare"]).success();
    host.ublkimg(&["cdi", "generate", "bare"]).refused(2, &["bare", "not mounted"]);
    host.ublkimg(&["cdi", "generate", "weights", "--kind", "odd"]).refused(2, &["odd=weights"]);
    host.end();
}

#[test]
fn a_container_keeps_what_it_uses() {
    let host = match Host::with_shell() {
        Ok(host) => host,
        Err(reason) => skip!("{reason}"),
    };
    let models = format!("/models/big={}", host.registry.reference("shell", "v1"));
    for program in runtimes() {
        // Also as a mount of the image within.
        let script = "cat /models/big/data | busybox wc -c; ! echo x 2>/dev/null > /models/big/y; sleep 300";
        let directory = bundle(&host, "one", &["--mount-image", &models], &["/bin/sh", "-c", script]);
        let mut container = start(&host, program, &directory, "c1");
        let named = |prefix: &str| {
            let devices = host.devices();
            let mut names = devices.iter().filter_map(|device| device["name"].as_str());
            names.find(|name| name.starts_with(prefix)).map(str::to_owned)
        };
        let running = format!("{}/c1", host.root.join("run/leases/one").display());
        wait_until("the root is leased", || Path::new(&running).exists());
        wait_until("the image is attached", || named("hook-").is_some());
        wait_until("the container runs", || {
            let state = runtime(&host, program).args(["state", "c1"]).output().unwrap();
            String::from_utf8_lossy(&state.stdout).contains("\"running\"")
        });
        let image = named("hook-").unwrap();
        for name in ["one", &image] {
            host.ublkimg(&["rm", name]).refused(9, &["leased", "c1"]);
        }
        assert!(runtime(&host, program).args(["kill", "c1", "KILL"]).status().unwrap().success());
        container.wait().unwrap();
        // The runtime calls the last hook before it ends.
        assert_eq!(named("hook-"), None, "{program}");
        host.ublkimg(&["rm", "one"]).success();
    }
    host.end();
}

#[test]
fn what_a_container_sees_of_a_mounted_image() {
    let host = match Host::with_shell() {
        Ok(host) => host,
        Err(reason) => skip!("{reason}"),
    };
    let models = format!("/models/big={}", host.registry.reference("shell", "v1"));
    for program in runtimes() {
        let script = "cat /models/big/data | busybox wc -c; (echo x > /models/big/y) 2>/dev/null || echo read-only";
        let directory = bundle(&host, "one", &["--mount-image", &models], &["/bin/sh", "-c", script]);
        assert_eq!(succeeds(&host, program, &directory, "c1"), "1048576\nread-only\n", "{program}");
        assert_eq!(host.devices().len(), 1, "{program}: the hook's device went with the container");
        host.ublkimg(&["rm", "one"]).success();
        // An image that is not there: no container, and nothing is left.
        let missing = format!("/m={}", host.registry.reference("nothing", "v1"));
        let directory = bundle(&host, "one", &["--mount-image", &missing], &["/bin/sh"]);
        let output = run(&host, program, &directory, "c2");
        assert!(!output.status.success(), "{program}");
        drop(runtime(&host, program).args(["delete", "--force", "c2"]).output());
        assert_eq!(host.devices().len(), 1, "{program}");
        host.ublkimg(&["rm", "one"]).success();
    }
    host.end();
}

#[test]
fn a_container_survives_a_crash_of_the_daemon() {
    let host = match Host::with_shell() {
        Ok(host) => host,
        Err(reason) => skip!("{reason}"),
    };
    let models = format!("/models={}", host.registry.reference("shell", "v1"));
    let script = "echo > /up; while [ ! -e /go ]; do busybox sleep 0.1; done; cat /data /models/data | busybox wc -c";
    let bundled = bundle(&host, "one", &["--mount-image", &models], &["/bin/sh", "-c", script]);
    if host.devices()[0]["transport"] != "ublk" {
        host.ublkimg(&["rm", "one"]).success();
        host.end();
        skip!("this kernel has no ublk, and a FUSE file goes with its server");
    }
    // A root that was added, under somebody's own configuration.
    let (root, own) = (host.root.join("root"), host.root.join("own"));
    host.add("shell", &["--mount", root.to_str().unwrap(), "--overlay", "--name", "added"]).success();
    let text = std::fs::read_to_string(bundled.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["root"]["path"] = root.to_str().unwrap().into();
    config["process"]["args"][2] = script.replace(" /models/data", "").into();
    for ours in ["hooks", "annotations"] {
        config.as_object_mut().unwrap().remove(ours);
    }
    std::fs::create_dir(&own).unwrap();
    std::fs::write(own.join("config.json"), config.to_string()).unwrap();
    for program in runtimes() {
        for (directory, root, said) in [(&bundled, &bundled.join("rootfs"), "2097152\n"), (&own, &root, "1048576\n")] {
            let (up, go) = (root.join("up"), root.join("go"));
            std::thread::scope(|scope| {
                let container = scope.spawn(|| succeeds(&host, program, directory, "c1"));
                wait_until("the container runs", || up.exists());
                host.kill_server();
                std::fs::write(&go, "").unwrap();
                assert_eq!(container.join().unwrap(), said, "{program}");
            });
            std::fs::remove_file(&up).unwrap();
            std::fs::remove_file(&go).unwrap();
        }
    }
    host.ublkimg(&["rm", "one"]).success();
    host.end();
}

/// The exit code of `ublkimg hook`, and all that it said.
fn call_hook(host: &Host, arguments: &[&str], state: &str) -> (Option<i32>, String) {
    let mut child = Command::new(ublkimg_path())
        .env("UBLKIMG_ROOT", host.root.join("store"))
        .env("UBLKIMG_RUN_DIR", host.root.join("run"))
        .arg("hook")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), state.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

#[test]
fn hooks_of_others_cost_nothing() {
    let host = Host::new(ublkimg_tests::registry::Auth::Anonymous);
    let call = |phase: &str, state: &str| call_hook(&host, &[phase], state);
    let state =
        format!(r#"{{"ociVersion": "1.0.2", "id": "c1", "pid": {}, "bundle": "/nonexistent"}}"#, std::process::id());
    for phase in ["prestart", "createRuntime", "createContainer", "poststart", "poststop", "somethingNew"] {
        assert_eq!(call(phase, &state), (Some(0), String::new()), "{phase}");
    }
    let (code, said) = call("createRuntime", "no state");
    assert_eq!((code, said.lines().count()), (Some(2), 1), "{said}");
    let (code, _) = call("poststop", "no state");
    assert_eq!(code, Some(0), "poststop never fails");
    // Nor where the host's configuration is broken.
    let broken = host.root.file("broken.toml", "odd = 1").unwrap();
    let with_it = |phase: &str| call_hook(&host, &[phase, "--config", broken.to_str().unwrap()], &state);
    let said = with_it("poststop");
    assert_eq!((said.0, said.1.lines().count()), (Some(0), 1), "{}", said.1);
    assert_eq!(with_it("createRuntime").0, Some(2));
    // A root that is not attached is an error before the container is made.
    let state = state.replace("\"bundle\"", "\"annotations\": {\"dev.ublkimg.root\": \"web\"}, \"bundle\"");
    let (code, said) = call("createRuntime", &state);
    assert_eq!((code, said.lines().count()), (Some(3), 1), "{said}");
    assert!(!host.root.join("run/leases/web/c1").exists());
}

/// A configuration with hooks for `phase`, which then also has them for `createContainer`.
fn with_both(config: &str, phase: &str) -> String {
    let mut config: Value = serde_json::from_str(config).unwrap();
    let hooks: Value = config["hooks"][phase].clone();
    let looking = hooks.to_string().replace(&format!("\"{phase}\""), "\"createContainer\"");
    config["hooks"]["createContainer"] = serde_json::from_str(&looking).unwrap();
    config.to_string()
}

#[test]
fn each_phase_before_the_start_mounts_an_image() {
    let host = match Host::with_shell() {
        Ok(host) => host,
        Err(reason) => skip!("{reason}"),
    };
    let models = format!("/models={}", host.registry.reference("shell", "v1"));
    for (program, phase) in runtimes().into_iter().flat_map(|program| PHASES.map(|phase| (program, phase))) {
        let script = "cat /models/data | busybox wc -c > /ready; exec sleep 300";
        let directory = bundle(&host, "one", &["--mount-image", &models], &["/bin/sh", "-c", script]);
        let config = directory.join("config.json");
        let written = std::fs::read_to_string(&config).unwrap();
        // The phase that looks must find it; without another it stops the container.
        let with = |phase: &str| written.replace("\"createRuntime\"", &format!("\"{phase}\""));
        std::fs::write(&config, with("createContainer")).unwrap();
        let output = run(&host, program, &directory, "c0");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success(), "{program}: {said}");
        // crun does not say what a hook said.
        assert!(["exit status 3,", "exit code: 3)"].iter().any(|code| said.contains(code)), "{program}: {said}");
        std::fs::write(&config, with_both(&with(phase), phase)).unwrap();
        let mut container = start(&host, program, &directory, "c1");
        let ready = directory.join("rootfs/ready");
        wait_until(&format!("{program}, {phase}: the container runs"), || {
            assert!(container.try_wait().unwrap().is_none(), "{program}, {phase}: no container");
            std::fs::read_to_string(&ready).is_ok_and(|size| size == "1048576\n")
        });
        let state = runtime(&host, program).args(["state", "c1"]).output().unwrap().stdout;
        let state: Value = serde_json::from_slice(&state).unwrap();
        let devices = host.devices();
        let name = devices.iter().find_map(|device| device["name"].as_str().filter(|name| name.starts_with("hook-")));
        let lease = std::fs::read(host.root.join("run/leases").join(name.unwrap()).join("c1")).unwrap();
        let lease: Value = serde_json::from_slice(&lease).unwrap();
        assert_eq!(lease["pid"], state["pid"], "{program}, {phase}: it ends with the container");
        assert!(runtime(&host, program).args(["kill", "c1", "KILL"]).status().unwrap().success());
        container.wait().unwrap();
        assert_eq!(host.devices().len(), 1, "{program}, {phase}: the hook's device went with the container");
        host.ublkimg(&["rm", "one"]).success();
    }
    host.end();
}

#[test]
fn a_hook_that_is_called_again_changes_nothing() {
    let host = match Host::with_shell() {
        Ok(host) => host,
        Err(reason) => skip!("{reason}"),
    };
    host.root.dir("rootfs/models").unwrap();
    host.root.file("config.json", r#"{"root": {"path": "rootfs"}}"#).unwrap();
    let mut container = Command::new("unshare").args(["--mount", "sleep", "600"]).spawn().unwrap();
    let namespace = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/mnt")).unwrap();
    wait_until("it has a mount namespace", || namespace(&container.id().to_string()) != namespace("self"));
    let state = serde_json::json!({
        "ociVersion": "1.0.2", "id": "c1", "pid": container.id(), "bundle": host.root.path(),
        "annotations": {"dev.ublkimg.mount./models": host.registry.reference("shell", "v1")},
    })
    .to_string();
    for phase in ["prestart", "createRuntime", "createRuntime"] {
        let (code, said) = call_hook(&host, &[phase], &state);
        assert_eq!(code, Some(0), "{phase}: {said}");
    }
    let mounts = std::fs::read_to_string(format!("/proc/{}/mountinfo", container.id())).unwrap();
    assert_eq!(mounts.lines().filter(|line| line.contains("/rootfs/models ")).count(), 1, "{mounts}");
    container.kill().unwrap();
    container.wait().unwrap();
    for _ in 0..2 {
        assert_eq!(call_hook(&host, &["poststop"], &state), (Some(0), String::new()));
    }
    assert_eq!(host.devices(), Vec::<Value>::new());
    host.end();
}

#[test]
fn a_hook_ends_by_itself() {
    let host = Host::new(ublkimg_tests::registry::Auth::Anonymous);
    std::fs::write(host.root.join("config.json"), r#"{"ociVersion": "1.0.2", "root": {"path": "rootfs"}}"#).unwrap();
    let reference = host.registry.reference("shell", "v1");
    let state = serde_json::json!({
        "ociVersion": "1.0.2", "id": "c1", "pid": std::process::id(), "bundle": host.root.path(),
        "annotations": {"dev.ublkimg.mount./m": reference},
    })
    .to_string();
    let (_code, said) = call_hook(&host, &["createRuntime", "--dry-run"], &state);
    let name = said.split(' ').skip_while(|word| *word != "as").nth(1).unwrap().trim_end_matches(',');
    // Somebody holds the leases of its device for ever.
    let leases = host.root.join("run/leases").join(name);
    std::fs::create_dir_all(&leases).unwrap();
    let lock = std::fs::File::create(leases.join(".lock")).unwrap();
    lock.lock().unwrap();
    let (code, said) = call_hook(&host, &["createRuntime", "--timeout=10ms"], &state);
    assert_eq!((code, said.lines().count()), (Some(7), 1), "{said}");
    assert!(said.contains("createRuntime was not done within"), "{said}");
    assert_eq!(call_hook(&host, &["poststop", "--timeout=10ms"], &state), (Some(0), String::new()));
}
