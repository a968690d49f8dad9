//! What is started: images that `tests/demo/build-image.sh` makes, their commands, and when they count as started.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context as _, Result};
use ublkimg_tests::start::container::Ready;

/// An image with a command, and another command of the same image, for which the profile of the first is wrong.
#[derive(Debug, Clone)]
pub(crate) struct Workload {
    /// Name of the row.
    pub(crate) name: &'static str,
    /// Name of the image, and of its repository.
    pub(crate) image: &'static str,
    /// What is started.
    pub(crate) start: Start,
    /// What else can be started from the image.
    pub(crate) other: Start,
}

/// A command, and when it counts as started.
#[derive(Debug, Clone)]
pub(crate) struct Start {
    /// With its arguments.
    pub(crate) command: Vec<String>,
    /// When it is ready.
    pub(crate) ready: Ready,
}

impl Workload {
    /// The workload of this name.
    pub(crate) fn named(name: &str) -> Result<Self> {
        let all = all();
        let names: Vec<&str> = all.iter().map(|workload| workload.name).collect();
        let known = format!("no workload is called {name}: there are {}", names.join(", "));
        all.into_iter().find(|workload| workload.name == name).context(known)
    }
}

fn all() -> Vec<Workload> {
    vec![
        Workload {
            name: "scipy",
            image: "scipy",
            start: Start::exits(&["python3", "/srv/plot.py"]),
            other: Start::exits(&["python3", "-c", "import sympy"]),
        },
        Workload {
            name: "scipy-stats",
            image: "scipy",
            start: Start::exits(&["python3", "-c", "import scipy.stats"]),
            other: Start::exits(&["python3", "-c", "import sympy"]),
        },
        Workload {
            name: "nginx",
            image: "nginx",
            start: Start::serves(&["nginx", "-g", "daemon off;"], 18080),
            other: Start::exits(&["perl", "-MPOSIX", "-MIO::Socket", "-e", "1"]),
        },
        Workload {
            name: "node",
            image: "node",
            start: Start::serves(&["node", "/srv/server.js"], 18081),
            other: Start::exits(&["node", "-e", "require('yargs'); require('semver')"]),
        },
        // The demo's image: small, for trying this program out.
        Workload {
            name: "numpy",
            image: "source",
            start: Start::exits(&["python3", "-c", "import numpy"]),
            other: Start::exits(&["perl", "-MPOSIX", "-e", "1"]),
        },
    ]
}

impl Start {
    fn exits(command: &[&str]) -> Self {
        Self { command: command.iter().map(|word| (*word).to_owned()).collect(), ready: Ready::Exit }
    }

    /// Answers on `port` of the loopback interface.
    fn serves(command: &[&str], port: u16) -> Self {
        Self { ready: Ready::Http(SocketAddr::from((Ipv4Addr::LOCALHOST, port))), ..Self::exits(command) }
    }
}
