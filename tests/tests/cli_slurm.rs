//! The scripts of docs/slurm.md, and programs in the root that they make: changed into as Slurm's jobs and enroot do it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ublkimg_tests::command::ublkimg_path;
use ublkimg_tests::host::Host;
use ublkimg_tests::{leaks, skip};

const PAGE: &str = include_str!("../../docs/slurm.md");

/// A user without rights.
const NOBODY: &str = "65534";

/// The script that the page has for this file, with the places of this test in it, as an executable file.
fn script(host: &Host, name: &str) -> PathBuf {
    let blocks = PAGE.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let text = blocks.into_iter().find(|block| block.contains(name)).unwrap();
    let text = text.replace("registry.example", &host.registry.addr().to_string());
    let text = text.replace("/run/jobs", &jobs(host)).replace("logger -t ublkimg", "cat >&2");
    let file = host.root.file(name.replace('/', "-"), text).unwrap();
    std::fs::set_permissions(&file, Permissions::from_mode(0o755)).unwrap();
    file
}

/// Where the scripts make roots.
fn jobs(host: &Host) -> String {
    host.root.join("jobs").display().to_string()
}

/// Runs a script as slurmd would, with nothing of a user in its environment.
fn run_for_job(host: &Host, script: &Path, comment: &str) {
    let program = ublkimg_path();
    // What the scripts say goes to the output of the test, which has no journal.
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", program.parent().unwrap().display());
    let config = format!("root = {:?}\nrun-dir = {:?}\n", host.root.join("store"), host.root.join("run"));
    let config = host.root.file("config.toml", config).unwrap();
    let mut command = Command::new(script);
    command.env_clear().env("PATH", path).env("SLURM_JOB_ID", "17").env("SLURM_JOB_COMMENT", comment);
    assert!(command.env("UBLKIMG_CONFIG", config).status().unwrap().success());
}

/// The words of this command, after `wrapper`, and what they print.
fn printed(wrapper: &[&str], words: &[&str]) -> String {
    let output = Command::new(wrapper[0]).args(&wrapper[1..]).args(words).output().unwrap();
    assert!(output.status.success(), "{wrapper:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_job_has_its_root_from_prolog_to_epilog() {
    let host = match Host::with_shell() {
        Ok(host) => host,
        Err(reason) => skip!("{reason}"),
    };
    let [prolog, epilog] = ["prolog.d/50-ublkimg.sh", "epilog.d/50-ublkimg.sh"].map(|name| script(&host, name));
    for other in ["", "a comment", "image=elsewhere.test/shell:v1"] {
        run_for_job(&host, &prolog, other);
        run_for_job(&host, &epilog, other);
    }
    assert!(!host.root.join("jobs").exists(), "a root was made for a job that names no image of the registry");

    run_for_job(&host, &prolog, &format!("image={}", host.registry.reference("shell", "v1")));
    let root = format!("{}/17", jobs(&host));
    // A job's user, as the page has it. The test's own directory is root's alone; /run/jobs is everybody's to pass.
    std::fs::set_permissions(host.root.path(), Permissions::from_mode(0o711)).unwrap();
    let of_user =
        ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "unshare", "--user", "--map-root-user"];
    if Command::new(of_user[0]).args(&of_user[1..]).arg("true").status().is_ok_and(|status| status.success()) {
        let said = printed(&of_user, &["--root", &root, "/bin/cat", "/etc/passwd"]);
        assert_eq!(said, "root:x:0:0::/:/bin/sh\n");
    } else {
        skip::record("users of this machine have no user namespaces");
    }
    // enroot: the root is bound to itself, a lock file is written there, and it becomes the root of a mount namespace.
    let as_enroot =
        "mount --bind \"$0\" \"$0\" && cd \"$0\" && : >.lock && mkdir -p old && pivot_root . old && exec \"$@\"";
    let shell = ["unshare", "--mount", "--propagation", "slave", "sh", "-ec", as_enroot, &root];
    assert_eq!(printed(&shell, &["/bin/sh", "-c", "echo changed >/written; cat /written"]), "changed\n");
    assert_eq!(std::fs::read_to_string(format!("{root}/written")).unwrap(), "changed\n");

    run_for_job(&host, &epilog, "");
    assert!(!Path::new(&root).exists());
    assert!(host.devices().is_empty());
    assert_eq!(leaks::mounts_below(host.root.path()), Vec::<PathBuf>::new());
    host.end();
}
