//! Who may depend on whom. The table is that of the design.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

struct Rule {
    package: &'static str,
    /// Crates of the workspace that it may know.
    may_know: &'static [&'static str],
    /// Packages that must not be in its tree, however far down.
    must_not_reach: &'static [&'static str],
}

const ASYNC: &str = "tokio";
const HTTP: &str = "reqwest";
const UBLK: &str = "libublk";
const TAR: &str = "tar-core";

const TABLE: [Rule; 8] = [
    Rule {
        package: "ublkimg-image",
        may_know: &[],
        must_not_reach: &[ASYNC, HTTP, UBLK, TAR, "futures-util", "io-uring", "rustix"],
    },
    Rule { package: "ublkimg-registry", may_know: &[], must_not_reach: &[UBLK, TAR, "io-uring", "fuser"] },
    Rule {
        package: "ublkimg-convert",
        may_know: &["ublkimg-image", "ublkimg-registry"],
        must_not_reach: &[UBLK, "io-uring", "fuser"],
    },
    Rule {
        package: "ublkimg-scheduler",
        may_know: &["ublkimg-image"],
        must_not_reach: &[ASYNC, HTTP, UBLK, TAR, "futures-util", "io-uring", "rustix", "rand"],
    },
    Rule {
        package: "ublkimg-driver",
        may_know: &["ublkimg-image", "ublkimg-registry", "ublkimg-scheduler"],
        must_not_reach: &[TAR, "flate2"],
    },
    Rule {
        package: "ublkimg",
        may_know: &["ublkimg-image", "ublkimg-registry", "ublkimg-convert", "ublkimg-scheduler", "ublkimg-driver"],
        must_not_reach: &[],
    },
    Rule {
        package: "ublkimg-tests",
        may_know: &["ublkimg-image", "ublkimg-registry", "ublkimg-convert"],
        must_not_reach: &[UBLK, "io-uring", "fuser"],
    },
    Rule {
        package: "ublkimg-bench",
        may_know: &[
            "ublkimg-image",
            "ublkimg-registry",
            "ublkimg-convert",
            "ublkimg-scheduler",
            "ublkimg-driver",
            "ublkimg-tests",
        ],
        must_not_reach: &[],
    },
];

/// Direct dependencies that only one crate may have: the rest goes through that crate.
const BEHIND_ONE_CRATE: [(&str, &str); 4] =
    [(UBLK, "ublkimg-driver"), ("fuser", "ublkimg-driver"), (HTTP, "ublkimg-registry"), (TAR, "ublkimg-convert")];

/// Sentences about what is against the table, in crates as they are built, not tested.
pub(crate) fn violations() -> Vec<String> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let metadata = MetadataCommand::new()
        .current_dir(super::repository::root())
        // Packages of other platforms are not on a machine that has only built for its own.
        .other_options(["--locked", "--offline", "--filter-platform", &target].map(str::to_owned))
        .exec()
        .unwrap();
    let graph = graph(&metadata);
    let ours: BTreeSet<&str> = metadata.workspace_packages().iter().map(|package| package.name.as_str()).collect();
    let mut violations = Vec::new();
    for name in &ours {
        let Some(rule) = TABLE.iter().find(|rule| rule.package == *name) else {
            violations.push(format!("{name} is not in the table"));
            continue;
        };
        for known in graph[*name].iter().filter(|known| ours.contains(**known) && !rule.may_know.contains(known)) {
            violations.push(format!("{name} must not know {known}"));
        }
        let reached = reached(&graph, name);
        for found in rule.must_not_reach.iter().filter(|wrong| reached.contains(**wrong)) {
            violations.push(format!("{name} must not reach {found}"));
        }
        for (package, owner) in BEHIND_ONE_CRATE {
            if *name != owner && graph[*name].contains(package) && *name != "ublkimg-bench" {
                violations.push(format!("only {owner} may use {package}, not {name}"));
            }
        }
    }
    violations
}

/// The names of the packages that each package is built with.
fn graph(metadata: &Metadata) -> BTreeMap<&str, BTreeSet<&str>> {
    let name = |id| metadata[id].name.as_str();
    let mut graph: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for node in &metadata.resolve.as_ref().unwrap().nodes {
        let built_with = node.deps.iter().filter(|dependency| {
            dependency.dep_kinds.iter().any(|kind| kind.kind == DependencyKind::Normal && for_linux(kind))
        });
        graph.entry(name(&node.id)).or_default().extend(built_with.map(|dependency| name(&dependency.pkg)));
    }
    graph
}

/// Good enough for the targets that occur: what is only for other systems names them.
fn for_linux(kind: &cargo_metadata::DepKindInfo) -> bool {
    let target = kind.target.as_ref().map(ToString::to_string).unwrap_or_default();
    !["windows", "wasm", "macos", "apple", "redox", "hermit", "wasi"].iter().any(|other| target.contains(other))
}

fn reached<'a>(graph: &BTreeMap<&'a str, BTreeSet<&'a str>>, from: &'a str) -> BTreeSet<&'a str> {
    let mut reached = BTreeSet::new();
    let mut open = vec![from];
    while let Some(package) = open.pop() {
        for next in &graph[package] {
            if reached.insert(*next) {
                open.push(next);
            }
        }
    }
    reached
}
