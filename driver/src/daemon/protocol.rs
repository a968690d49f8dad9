//! What commands and the server say to each other: one JSON line each way over a Unix socket, then the connection closes.
//!
//! Both ends are the same binary, so the lines carry no version; a field that one side does not know is refused.

use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::counters::ImageStatistics;
use crate::device::{DataPath, QueueOptions, Transport};
use crate::error::ErrorKind;
pub use crate::figures::{BoundFigures, FillFigures, RecordingFigures, StartFigures};
pub use crate::outage::Waiting;
use crate::pull::{Pull, Pulled};
use crate::start_events::StartEvent;
pub use crate::store::{Checked, Limits, Room, Usage};
use crate::verity::VerityTable;

/// A request line may have this many bytes: a command of 128 KiB, each byte escaped, a few paths of at most 4 KiB each and
/// the names around them.
pub const REQUEST_MAX_BYTES: usize = 1 << 20;

/// An answer line may have this many bytes: `ls` of the kernel's largest number of devices, a few KiB each, or the events
/// of a start, 65536 of at most 110 bytes.
pub const ANSWER_MAX_BYTES: usize = 16 << 20;

/// An image that is to be fetched.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PullRequest {
    /// The image.
    pub reference: String,
    /// Plain HTTP also to registries that are not on this machine.
    pub plain_http: bool,
    /// File with credentials, absolute.
    pub auth_file: Option<PathBuf>,
    /// See [`ublkimg_registry::ClientOptions::credential_files`]: where the command looks for them without `auth_file`; absolute.
    #[serde(default)]
    pub credential_files: Vec<PathBuf>,
    /// See [`ublkimg_registry::ClientOptions::hosts_dirs`]; absolute.
    #[serde(default)]
    pub hosts_dirs: Vec<PathBuf>,
    /// How long the registry may be silent.
    pub read_timeout_ms: u64,
    /// The profile, and the command that chooses it.
    pub start: StartOptions,
    /// How much of it.
    pub what: Pull,
}

/// What a command asks of the server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Is anybody there?
    Ping,
    /// Attach an image.
    Add(AddRequest),
    /// Fetch an image without attaching it to a device.
    Pull(PullRequest),
    /// A mount of the device was made by `add --mount`.
    Mounted {
        /// The device's name.
        name: String,
        /// The mount point, absolute.
        directory: PathBuf,
    },
    /// Stop and delete the device; the caller has unmounted it.
    Remove {
        /// The device's name.
        name: String,
        /// Also if somebody still holds it: they get errors.
        force: bool,
    },
    /// All devices.
    List,
    /// What the start of a device took, as far as it is known.
    Figures {
        /// The device's name.
        name: String,
    },
    /// What happened in the start of a device, event by event.
    Events {
        /// The device's name.
        name: String,
    },
    /// Record first reads from now on, in place of the recording under way.
    RecordStart {
        /// The device's name.
        name: String,
        /// The command that is about to run; empty for that of `add`.
        command: Vec<String>,
        /// The device's read-ahead window while it is recorded.
        read_ahead_kb: u32,
    },
    /// End the recording.
    RecordStop {
        /// The device's name.
        name: String,
    },
    /// The program that runs from the device is ready: its start is over.
    Ready {
        /// The device's name.
        name: String,
    },
    /// Fetch what nobody has asked for.
    Fill {
        /// The device's name.
        name: String,
        /// How hard.
        mode: FillMode,
    },
    /// What of the device's profile is to be pushed into the page cache next.
    Warm {
        /// The device's name.
        name: String,
    },
    /// The mount is about to go: whoever pushes is to leave it alone.
    EndWarming {
        /// The device's name.
        name: String,
    },
    /// Look after the store.
    Cache(CacheRequest),
    /// Let go of the devices for the server that asks, and end. Refused while another command is at work.
    HandOver,
    /// End the server. Refused while it has devices, unless they are to be left for the next server.
    Stop {
        /// Leave the devices in the kernel: readers wait until a server takes them back.
        keep_devices: bool,
    },
}

/// What `cache` asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum CacheRequest {
    /// What is there.
    Status,
    /// Read everything, and drop what is damaged.
    Verify,
    /// Evict what is beyond these limits, or beyond the daemon's if none is given.
    Collect {
        /// See [`Limits`].
        cache_bytes_max: Option<u64>,
        /// See [`Limits`].
        free_bytes_min: Option<u64>,
        /// Also everything that no device has and nobody has pinned.
        unused: bool,
    },
    /// Never evict what this device serves.
    Pin {
        /// The device's name.
        name: String,
    },
    /// Take a pin away.
    Unpin {
        /// A device's name, or the reference or manifest digest of a pin.
        target: String,
    },
}

/// The answer to [`CacheRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheAnswer {
    /// To [`CacheRequest::Status`].
    Status(CacheStatus),
    /// To [`CacheRequest::Verify`].
    Checked(Checked),
    /// To [`CacheRequest::Collect`].
    Freed {
        /// Bytes that were given back.
        freed_bytes: u64,
    },
    /// To the others.
    Done,
}

/// What is in the store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CacheStatus {
    /// How much room there is.
    pub room: Room,
    /// How much it may take.
    pub limits: Limits,
    /// Blob files, least recently used first.
    pub blobs: Vec<BlobLine>,
    /// Pinned images.
    pub pins: Vec<PinLine>,
}

/// A blob file and who has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlobLine {
    /// What it takes.
    #[serde(flatten)]
    pub usage: Usage,
    /// Names of the devices that serve it.
    pub devices: Vec<String>,
    /// Whether it is never evicted.
    pub is_pinned: bool,
}

/// A pinned image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PinLine {
    /// What it was called.
    pub reference: String,
    /// Digest of its manifest.
    pub manifest: String,
}

/// What `add` asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddRequest {
    /// The reference as the user gave it, layout directories made absolute.
    pub reference: String,
    /// The device's name; default: made of the reference.
    pub name: Option<String>,
    /// How to serve it.
    pub transport: Transport,
    /// How its queue is set up.
    #[serde(default)]
    pub queue: QueueOptions,
    /// Plain HTTP also for registries that are not on this machine.
    pub plain_http: bool,
    /// A credentials file to use instead of the usual ones.
    pub auth_file: Option<PathBuf>,
    /// See [`PullRequest::credential_files`].
    #[serde(default)]
    pub credential_files: Vec<PathBuf>,
    /// See [`ublkimg_registry::ClientOptions::hosts_dirs`]; absolute.
    #[serde(default)]
    pub hosts_dirs: Vec<PathBuf>,
    /// How long attaching may take.
    pub attach_timeout_ms: u64,
    /// How long a read may wait for the registry before it fails with EIO.
    pub read_timeout_ms: u64,
    /// Reads wait for ever instead.
    #[serde(default)]
    pub holds_reads: bool,
    /// Refused unless the image has a verity tree, which the caller sets up.
    #[serde(default)]
    pub verity: bool,
    /// How the image is started.
    pub start: StartOptions,
}

/// How an image is started: what is fetched before it is asked for, and what is kept of the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartOptions {
    /// The order in which to fetch.
    pub profile: ProfileRequest,
    /// The command that is about to run, which chooses the profile; empty if unknown.
    pub command: Vec<String>,
    /// Whether the first run is recorded when no published profile is followed.
    pub record: bool,
    /// The read-ahead window once the start is over; default: the kernel's.
    pub read_ahead_kb: Option<u32>,
    /// What to fetch once the start is over.
    pub fill: FillMode,
    /// Whether blocks that the profile foretells are pushed into the page cache as they arrive.
    #[serde(default)]
    pub warm: bool,
}

/// Where the order comes from in which a start is fetched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProfileRequest {
    /// The image's profile for the command, else the image's default, else what this host recorded, else none.
    #[default]
    Auto,
    /// None.
    None,
    /// The image's profile with this name, or with this digest (`sha256:...`).
    Named(String),
    /// The trace in a file: an order only.
    File(PathBuf),
}

/// How hard to fetch what nobody has asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FillMode {
    /// Not at all.
    #[default]
    Off,
    /// At a share of the link, when nobody waits.
    Idle,
    /// At full rate.
    Full,
}

/// What the server answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To [`Request::Ping`].
    Pong {
        /// The server's process id.
        pid: u32,
    },
    /// To [`Request::Add`].
    Added {
        /// The device.
        device: Box<DeviceStatus>,
        /// Whether this request made it; otherwise it was there.
        created: bool,
    },
    /// To [`Request::Pull`].
    Pulled(Pulled),
    /// To [`Request::List`].
    Devices(Vec<DeviceStatus>),
    /// To [`Request::Figures`].
    Figures(Box<StartFigures>),
    /// To [`Request::Events`].
    Events(Vec<StartEvent>),
    /// To [`Request::RecordStop`].
    Recorded {
        /// The trace, one zstd frame, in the store: to be copied.
        path: PathBuf,
        /// First reads in it.
        entries: u64,
        /// Blocks in it.
        blocks: u64,
        /// First reads that are missing in it because there was no room.
        lost: u64,
    },
    /// To [`Request::Warm`]: blocks of the device, in the order of the profile; none when it is over.
    Warm(Option<Vec<Range<u32>>>),
    /// To [`Request::Cache`].
    Cache(CacheAnswer),
    /// To requests that return nothing.
    Done,
    /// To any request that failed.
    Failed(Fault),
}

/// A failure that crosses the socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fault {
    /// What the operator does next; becomes the exit code.
    pub kind: ErrorKind,
    /// One line that names the thing.
    pub message: String,
}

/// One device as `ls` and `status` show it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Its name.
    pub name: String,
    /// The reference given to `add`.
    pub reference: String,
    /// Digest of the image manifest.
    pub manifest: String,
    /// `/dev/ublkb0`, or `/dev/loop0` with the FUSE transport.
    pub device: PathBuf,
    /// `ublk` or `fuse`.
    pub transport: Transport,
    /// How data gets into requests of a ublk device.
    pub data_path: Option<DataPath>,
    /// Whether its mount wants a warmer.
    pub warms: bool,
    /// Mount points made by `add --mount`.
    pub mounts: Vec<PathBuf>,
    /// Size of the device.
    pub size_bytes: u64,
    /// What it has done since the server started.
    pub counters: ImageStatistics,
    /// Bytes of its layers that are in the store.
    pub stored_bytes: u64,
    /// Bytes of its layers.
    pub layer_bytes: u64,
    /// Bytes of its metadata, with which the device begins.
    pub metadata_bytes: u64,
    /// What waits for its registry.
    pub waiting: Option<Waiting>,
    /// What dm-verity needs over it, if its image has a tree.
    pub verity: Option<VerityTable>,
}
