//! `disksnap backup restore`: a point into a directory, disks to places of their own, or into a paused domain.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, ValueEnum, ValueHint};
use disksnap::{Error, ErrorKind, Result};
use disksnap_backup::{
    Compression, Form, IntoRequest, Manifest, PointRequest, Repository, RestoredDisk, RestoredInto,
    RestoredPoint, Target, restore_disks, restore_into, restore_point,
};
use serde::Serialize;
use uuid::Uuid;

use crate::backup::args::{Point, Repo, parse_compression};
use crate::backup::create::{no_xml, stopped};
use crate::backup::progress::Teller;
use crate::backup::{folder, repository};
use crate::context::Context;
use crate::failure::Outcome;
use crate::output::{Text, fields, size, table};
use crate::signals::Stop;

/// Which point, and where to.
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is an option of its own")]
#[command(group = ArgGroup::new("where").args(["to", "into", "disks"]).multiple(true).required(true))]
pub(crate) struct Restore {
    #[command(flatten)]
    pub(crate) repo: Repo,
    #[command(flatten)]
    pub(crate) point: Point,
    /// Restore the machine into this directory: an image per disk, EFI variables and TPM state, and the domain's XML that names
    /// them. Made if it does not exist; nothing in it is overwritten
    #[arg(long, value_name = "DIRECTORY", value_hint = ValueHint::DirPath, conflicts_with = "into")]
    to: Option<PathBuf>,
    /// Overwrite the disks of this domain, which is paused, through its own hypervisor: given as for -d
    #[arg(long, value_name = "DOMAIN", value_hint = ValueHint::FilePath)]
    into: Option<String>,
    /// A disk; may be given several times. With --to and --into: only these disks, by target. Otherwise TARGET=PLACE: a new
    /// file, a block device or an NBD URI
    #[arg(long = "disk", value_name = "TARGET[=PLACE]", value_parser = parse_place)]
    disks: Vec<Place>,
    /// What images are made; of a single file, what its suffix says
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<FormatArg>,
    /// Compress qcow2 images' clusters: zstd, or zstd:LEVEL with 1 to 19
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "zstd")]
    #[arg(value_parser = parse_compression)]
    compress: Option<Compression>,
    /// Take all of a raw image's room at once, instead of leaving holes where it is zero
    #[arg(long)]
    preallocate: bool,
    /// Overwrite what is on devices and exports. Files are never overwritten
    #[arg(long)]
    overwrite: bool,
    /// The ca-cert.pem, and client-cert.pem and client-key.pem, for exports that speak TLS
    #[arg(long, value_name = "DIRECTORY", value_hint = ValueHint::DirPath)]
    tls_credentials: Option<PathBuf>,
    /// With --to: only the disks, not the rest of the machine
    #[arg(long, requires = "to")]
    disks_only: bool,
    /// With --to: another name for the machine
    #[arg(long, value_name = "NAME", requires = "to")]
    name: Option<String>,
    /// With --to: a second machine beside the first, with this UUID, or a new one; network cards get new addresses
    #[arg(long, value_name = "UUID", requires = "to", num_args = 0..=1, require_equals = true)]
    #[allow(clippy::option_option, reason = "given without a value it means a new one")]
    new_uuid: Option<Option<Uuid>>,
    /// With --into: let the guest run afterwards, on the restored data
    #[arg(long, requires = "into")]
    resume: bool,
}

/// An image's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FormatArg {
    /// Thin, and standing alone
    Qcow2,
    /// The bytes as the guest sees them
    Raw,
}

/// A disk, and where it is to be.
#[derive(Debug, Clone)]
struct Place {
    target: String,
    place: Option<String>,
}

pub(crate) async fn run(context: &Context, restore: Restore) -> Outcome {
    let repository = repository(&restore.repo).await?;
    if let Some(domain) = &restore.into {
        return into_domain(context, &repository, &restore, domain).await;
    }
    let folder = folder(context, &repository).await?;
    let point = repository.point(&folder, &restore.point.point).await?;
    let stop = Stop::listen(false)?;
    let teller = Teller::new(context.out, &stop);
    let view = if let Some(directory) = &restore.to {
        let request = restore.directory_request(directory)?;
        let done = restore_point(&repository, &folder, &point, &request, &teller).await;
        done.map(|done| View::of_point(&point, done))
    } else {
        let to = restore.places()?;
        let done = restore_disks(&repository, &folder, &point, &to, restore.overwrite, &teller).await;
        done.map(|done| View::of_disks(&point, done))
    };
    teller.end();
    let view = view.map_err(|error| stopped(error, &stop))?;
    context.out.show(&view, no_xml)
}

async fn into_domain(context: &Context, repository: &Repository, restore: &Restore, domain: &str) -> Outcome {
    let request = restore.request_into()?;
    let target = context.target_of(domain).await?;
    // Its own backups, where no other domain's are meant.
    let own = match context.global.domain {
        Some(_) => None,
        None => repository.folder(&target.domain.id).await?,
    };
    let folder = match own {
        Some(own) => own,
        None if context.global.domain.is_some() => folder(context, repository).await?,
        None => {
            let message = format!("the repository has no backup of '{}'", target.domain.id.name);
            return Err(Error::new(ErrorKind::NotFound, message)
                .with("repository", repository.store().describe())
                .hint("Say with -d whose backup it is to be, where another machine's is meant.")
                .into());
        }
    };
    let point = repository.point(&folder, &restore.point.point).await?;
    let stop = Stop::listen(false)?;
    let teller = Teller::new(context.out, &stop);
    let from = (repository, &folder, &point);
    let done = restore_into(&target.disksnap, &target.domain, from, &request, &teller).await;
    teller.end();
    let done = done.map_err(|error| stopped(error, &stop))?;
    context.out.show(&View::of_domain(&point, done), no_xml)
}

impl Restore {
    fn directory_request(&self, directory: &Path) -> Result<PointRequest> {
        let form = self.form(self.format.unwrap_or(FormatArg::Qcow2))?;
        Ok(PointRequest {
            directory: directory.to_owned(),
            form,
            disks: self.targets()?,
            machine: !self.disks_only,
            name: self.name.clone(),
            uuid: self.new_uuid.map(|given| given.unwrap_or_else(Uuid::new_v4)),
        })
    }

    fn request_into(&self) -> Result<IntoRequest> {
        if self.format.is_some() || self.compress.is_some() || self.preallocate {
            return Err(invalid("a domain's disks stay in the format that they have")
                .hint("Leave out --format, --compress and --preallocate."));
        }
        Ok(IntoRequest {
            disks: self.targets()?,
            resume: self.resume,
        })
    }

    /// The disks that are named, where the places follow from something else.
    fn targets(&self) -> Result<Vec<String>> {
        let one = |disk: &Place| match &disk.place {
            None => Ok(disk.target.clone()),
            Some(place) => Err(invalid(format!(
                "the disk '{}' is given the place {place}, and a place for all of them is given too",
                disk.target
            ))
            .hint("Say --disk TARGET alone with --to and --into.")),
        };
        self.disks.iter().map(one).collect()
    }

    fn form(&self, format: FormatArg) -> Result<Form> {
        match format {
            FormatArg::Qcow2 if self.preallocate => {
                Err(invalid("qcow2 images are restored thin")
                    .hint("Ask for --format raw with --preallocate."))
            }
            FormatArg::Raw if self.compress.is_some() => {
                Err(invalid("raw images cannot be compressed")
                    .hint("Ask for --format qcow2 with --compress."))
            }
            FormatArg::Qcow2 => Ok(Form::Qcow2(self.compress.unwrap_or_default())),
            FormatArg::Raw => Ok(Form::Raw {
                sparse: !self.preallocate,
            }),
        }
    }

    fn places(&self) -> Result<Vec<(String, Target)>> {
        let one = |disk: &Place| {
            match &disk.place {
            Some(place) => Ok((disk.target.clone(), self.place(place)?)),
            None => Err(invalid(format!("nothing says where the disk '{}' is to be", disk.target)).hint(
                "Say --disk TARGET=PLACE: a new file, a block device or an NBD URI; or --to DIRECTORY, or --into DOMAIN.",
            )),
        }
        };
        self.disks.iter().map(one).collect()
    }

    /// What is no file gets the bytes as the guest sees them.
    fn refuse_form(&self, place: &str) -> Result<()> {
        if self.format == Some(FormatArg::Qcow2) || self.compress.is_some() || self.preallocate {
            let what = format!(
                "{place} gets the bytes as the guest sees them: --format, --compress and --preallocate are for files"
            );
            return Err(invalid(what));
        }
        Ok(())
    }

    fn place(&self, place: &str) -> Result<Target> {
        if place.contains("://") {
            self.refuse_form(place)?;
            return Ok(Target::Nbd {
                uri: place.to_owned(),
                tls: self.tls_credentials.clone(),
            });
        }
        let path = std::path::absolute(place).map_err(|e| Error::io("cannot tell where it is", e))?;
        if path
            .metadata()
            .is_ok_and(|about| about.file_type().is_block_device())
        {
            self.refuse_form(place)?;
            return Ok(Target::Device { path });
        }
        let format = self.format.map_or_else(|| by_suffix(&path), Ok)?;
        Ok(match self.form(format)? {
            Form::Qcow2(compression) => Target::Qcow2 { path, compression },
            Form::Raw { sparse } => Target::Raw { path, sparse },
        })
    }
}

fn by_suffix(path: &Path) -> Result<FormatArg> {
    match path.extension().and_then(|suffix| suffix.to_str()) {
        Some("qcow2") => Ok(FormatArg::Qcow2),
        Some("raw" | "img") => Ok(FormatArg::Raw),
        _ => Err(invalid(format!(
            "the name {} does not say in what format it is to be",
            path.display()
        ))
        .hint("Say --format, or let it end in .qcow2, .raw or .img.")),
    }
}

fn invalid(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, why)
}

fn parse_place(text: &str) -> std::result::Result<Place, String> {
    let (target, place) = match text.split_once('=') {
        Some((target, place)) => (target, Some(place)),
        None => (text, None),
    };
    if target.is_empty() || target.contains('/') || place == Some("") {
        return Err("expected TARGET or TARGET=PLACE, such as vda=/images/vda.qcow2".to_owned());
    }
    Ok(Place {
        target: target.to_owned(),
        place: place.map(str::to_owned),
    })
}

/// What was restored.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct View {
    domain: String,
    point: String,
    disks: Vec<RestoredDisk>,
    #[serde(skip_serializing_if = "Option::is_none")]
    document: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nvram: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tpm: Option<PathBuf>,
    /// Whether the guest was let run, where it was restored into a domain.
    #[serde(skip_serializing_if = "Option::is_none")]
    resumed: Option<bool>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

impl View {
    fn new(point: &Manifest, disks: Vec<RestoredDisk>) -> Self {
        Self {
            domain: point.domain.name.clone(),
            point: point.point.clone(),
            disks,
            document: None,
            nvram: None,
            tpm: None,
            resumed: None,
            warnings: Vec::new(),
        }
    }

    fn of_point(point: &Manifest, done: RestoredPoint) -> Self {
        Self {
            document: done.document,
            nvram: done.nvram,
            tpm: done.tpm,
            warnings: done.warnings,
            ..Self::new(point, done.disks)
        }
    }

    fn of_domain(point: &Manifest, done: RestoredInto) -> Self {
        Self {
            resumed: Some(done.resumed),
            warnings: done.warnings,
            ..Self::new(point, done.disks)
        }
    }

    fn of_disks(point: &Manifest, done: Vec<RestoredDisk>) -> Self {
        let notes = done.iter().flat_map(|disk| disk.restored.notes.clone()).collect();
        Self {
            warnings: notes,
            ..Self::new(point, done)
        }
    }
}

impl Text for View {
    fn text(&self) -> String {
        let mut out = format!("restored {} as it was at {}\n", self.domain, self.point);
        let mut rows = vec![["DISK", "SIZE", "DATA", "PLACE"].map(str::to_owned).to_vec()];
        rows.extend(self.disks.iter().map(|disk| {
            let done = &disk.restored;
            vec![
                disk.target.clone(),
                size(done.bytes),
                size(done.bytes - done.zero),
                disk.place.clone(),
            ]
        }));
        out.push_str(&table(&rows));
        let named = [
            ("domain XML", &self.document),
            ("EFI variables", &self.nvram),
            ("TPM state", &self.tpm),
        ];
        let paths = named
            .iter()
            .filter_map(|(name, path)| Some((*name, path.as_ref()?.display().to_string())));
        out.push_str(&fields("", paths));
        match self.resumed {
            Some(true) => out.push_str("the guest runs\n"),
            Some(false) => out.push_str("the guest is paused\n"),
            None => {}
        }
        out
    }
}
