//! What a vendor writes to have a provider examined: a [`Fixture`], which makes [`Setting`]s.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_core::{
    Capability, Connector, Disk, DiskChoice, DiskSnapshot, Domain, Error, ErrorKind, Result, Snapshot, Source,
};

/// A provider and the means to try it.
#[async_trait]
pub trait Fixture: fmt::Debug + Send + Sync + 'static {
    /// A new instance of the provider at each call, as another process would make one.
    fn provider(&self) -> Arc<dyn DiskSnapshot>;

    /// What the method offers on the disks of a [`Setting`], in full. Written down by hand, so that the
    /// list cannot shrink unseen: never ask the provider for it.
    fn expected_capabilities(&self) -> Vec<Capability>;

    /// A fresh domain with at least `disks` disks that suit the method, and nothing else in it.
    ///
    /// Each disk holds 1 to 16 MiB: the suite reads and overwrites it whole, many times. Where the
    /// storage allows it, make the size no multiple of a cluster (2 MiB + 512 bytes), so that the tail is
    /// tried too. What the setting made is removed when it is dropped.
    async fn setting(&self, disks: usize) -> Result<Box<dyn Setting>>;

    /// What went wrong below the provider in settings that were dropped since the last call: a hypervisor that
    /// ended by itself, with its exit status and what it said. A case that fails tells it.
    fn postmortem(&self) -> Option<String> {
        None
    }
}

/// One domain with its disks, for the length of one case.
///
/// Offsets and lengths are bytes and multiples of 512.
#[async_trait]
pub trait Setting: fmt::Debug + Send + Sync {
    /// The domain, as a caller would give it to the dispatcher. All its disks suit the method.
    fn domain(&self) -> &Domain;

    /// Reaches the domain. [`InactiveConnector`](crate::InactiveConnector) for one that is off.
    fn connector(&self) -> Arc<dyn Connector>;

    /// How a caller asks for this disk to be snapshotted by the method: the method's name and its options.
    fn choice(&self, target: &str) -> DiskChoice;

    /// A disk that the method cannot work with, which need not belong to the domain.
    fn unfit_disk(&self) -> Disk;

    /// The size of a disk in bytes.
    fn size(&self, target: &str) -> u64;

    /// Fills a range with one byte, the way the domain writes.
    async fn fill(&self, target: &str, offset: u64, len: u64, byte: u8) -> Result<()>;

    /// Zeroes a range by the request that the domain has for it (write zeroes), or by writing zeros.
    async fn zero(&self, target: &str, offset: u64, len: u64) -> Result<()>;

    /// Reads a range of the live disk, the way the domain reads.
    async fn read_disk(&self, target: &str, offset: u64, len: u64) -> Result<Vec<u8>>;

    /// Reads a range of a snapshot, opened at `source` in this image format. [`read_file`] does it for
    /// raw files and devices.
    async fn read_snapshot(&self, source: &Source, format: &str, offset: u64, len: u64) -> Result<Vec<u8>>;

    /// Follows a domain that is off to other disks: from now on [`Setting::domain`] says these, as its document would, and
    /// everything above reads and writes them. A disk that is not among them stays as it is.
    ///
    /// Called after a create, delete or revert by which the domain uses other disks than before. A domain that runs is
    /// never followed so: it says itself what its disks are.
    ///
    /// # Errors
    /// `Unsupported`, which is the default: the fixture cannot follow, so the provider must leave the domain its disks.
    fn adopt(&mut self, disks: &[Disk]) -> Result<()> {
        let targets: Vec<&str> = disks.iter().map(|disk| disk.target.as_str()).collect();
        let what = format!(
            "the domain uses other disks now ({}), and the fixture has no adopt() that follows it",
            targets.join(", ")
        );
        Err(Error::new(ErrorKind::Unsupported, what))
    }

    /// Spoils a snapshot behind the provider's back, as a mistake or a failing disk would: its file
    /// removed, its volume deleted. The suite then wants to be told so.
    async fn damage(&self, snapshot: &Snapshot) -> Result<()>;

    /// Everything that exists beside the domain's disks: files, volumes, nodes, jobs, …, each as one
    /// line. Empty in a fresh setting. The suite looks here for what is left behind, so look at
    /// the real thing and hide nothing.
    async fn leftovers(&self) -> Result<Vec<String>>;
}

/// Reads a range of a snapshot whose source is a raw file or device.
///
/// # Errors
/// `Unsupported` for another source or format; the operating system's.
pub fn read_file(source: &Source, format: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let (Source::File { file: path } | Source::Block { dev: path }, "raw") = (source, format) else {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("{source} ({format}) is not a raw file"),
        ));
    };
    let failed = |e| Error::io(format!("cannot read {}", path.display()), e);
    let file = std::fs::File::open(path).map_err(failed)?;
    let len =
        usize::try_from(len).map_err(|e| Error::new(ErrorKind::Invalid, "too long a read").because(e))?;
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset).map_err(failed)?;
    Ok(bytes)
}
