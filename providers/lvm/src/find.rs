//! From disks to logical volumes: which volume a disk lives on, what kind of snapshot it takes, which disks share one.

use std::fs::File;
use std::path::{Path, PathBuf};

use disksnap_core::{Disk, DiskRequest, ErrorKind, FileInside, Source};
use disksnap_image_file::{ImageFile, Qcow2, Unfit};

use crate::chain;
use crate::device::{Named, of_number, of_path};
use crate::filling::{filling, pool_fault};
use crate::mount::{self, Inside};
use crate::settings::Settings;
use crate::volume::Volume;

/// Where a disk's bytes are, as far as the kernel tells without lvm2.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    named: Named,
    /// What is said of it in errors: the disk's device or file.
    shown: String,
    /// The disk is a file of a file system on the volume.
    inside: Option<Inside>,
    /// Whether the kernel shows that the disk is on the volume; else the caller says so.
    seen: bool,
}

/// The two ways of lvm2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// A volume of its own takes what is overwritten; full, it breaks.
    Classic,
    /// Both share blocks of one pool.
    Thin,
}

impl Way {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Classic => "classic",
            Self::Thin => "thin",
        }
    }
}

/// One disk on its volume.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) request: DiskRequest,
    pub(crate) settings: Settings,
    pub(crate) volume: Volume,
    pub(crate) way: Way,
    pub(crate) inside: Option<Inside>,
    pub(crate) format: String,
    /// The layers below an image in a file system, nearest first.
    pub(crate) below: Vec<FileInside>,
    /// The virtual size in bytes, where it is known.
    pub(crate) size: Option<u64>,
    /// Whether the image's header says that its content is encrypted.
    pub(crate) encrypted: bool,
    /// What the operator should know.
    pub(crate) warnings: Vec<String>,
}

impl Found {
    /// Disks with the same key share one snapshot.
    pub(crate) fn unit(&self) -> String {
        self.volume.full_name()
    }
}

impl Place {
    /// Looks where a disk is. Asks the kernel only, so that a disk elsewhere is told without lvm2.
    pub(crate) fn of(disk: &Disk, settings: &Settings) -> Result<Self, Unfit> {
        let given = settings.device.as_deref();
        match &disk.source {
            Some(Source::Block { dev }) => Self::on_device(dev).and_then(|place| place.agrees_with(given)),
            Some(Source::File { file }) => match (Self::of_file(file), given) {
                (Ok(place), _) => place.agrees_with(given),
                (Err(unfit), Some(given)) if unfit.kind != ErrorKind::NotFound => Err(Unfit {
                    kind: ErrorKind::Invalid,
                    why: format!(
                        "device.path says that the image is on {}, and it is not: {}; a snapshot of that volume would not \
                         hold the disk. Leave device.path out, and choose a method for where the image is",
                        given.display(),
                        unfit.why
                    ),
                }),
                (Err(unfit), _) => Err(unfit),
            },
            Some(other) => {
                let Some(device) = given else {
                    let why = format!(
                        "the disk ({}) is neither a device nor a file of this host",
                        other.kind()
                    );
                    return Err(why.into());
                };
                Ok(Self {
                    named: of_path(device)?,
                    shown: device.display().to_string(),
                    inside: None,
                    seen: false,
                })
            }
            None => Err("the drive is empty".to_owned().into()),
        }
    }

    fn on_device(device: &Path) -> Result<Self, Unfit> {
        Ok(Self {
            named: of_path(device)?,
            shown: device.display().to_string(),
            inside: None,
            seen: true,
        })
    }

    fn of_file(file: &Path) -> Result<Self, Unfit> {
        let shown = file.display();
        let path = file.canonicalize().map_err(|e| Unfit {
            kind: ErrorKind::of_io(&e),
            why: format!("cannot find {shown}: {e}"),
        })?;
        // A device that the document calls a file.
        if path.starts_with("/dev") {
            return Self::on_device(&path);
        }
        let inside = mount::inside(&path)?;
        let about = format!("the device of the file system that {shown} is on");
        Ok(Self {
            named: Named::Id(of_number(&inside.number, &about)?),
            shown: shown.to_string(),
            inside: Some(inside),
            seen: true,
        })
    }

    /// The volume that the caller gave must be the one the disk is on.
    fn agrees_with(self, given: Option<&Path>) -> Result<Self, Unfit> {
        match given {
            Some(given) if of_path(given)? != self.named => Err(Unfit {
                kind: ErrorKind::Invalid,
                why: format!(
                    "{} is not the logical volume that {} is on: its snapshot would not hold the disk",
                    given.display(),
                    self.shown
                ),
            }),
            _ => Ok(self),
        }
    }

    /// The volume, if it can be snapshotted now.
    fn volume<'a>(&self, volumes: &'a [Volume]) -> Result<&'a Volume, Unfit> {
        let found = volumes.iter().find(|volume| match &self.named {
            Named::Id(id) => id.strip_prefix(&volume.group_uuid) == Some(&volume.uuid),
            Named::Name { group, name } => volume.group == *group && volume.name == *name,
        });
        let Some(volume) = found else {
            return Err(Unfit {
                kind: ErrorKind::NotFound,
                why: format!("there is no logical volume behind {} (any more)", self.shown),
            });
        };
        if volume.active && matches!(self.named, Named::Id(_)) {
            return Ok(volume);
        }
        let name = volume.full_name();
        Err(Unfit {
            kind: ErrorKind::Unavailable,
            why: format!("the logical volume {name} is not active: `lvchange -ay {name}` activates it"),
        })
    }
}

/// A disk with its volume, if the method works with it now; else why not. Changes nothing.
pub(crate) fn find(
    request: &DiskRequest,
    settings: &Settings,
    place: &Place,
    volumes: &[Volume],
) -> Result<Found, Unfit> {
    let volume = place.volume(volumes)?;
    let way = way(volume, volumes)?;
    if way == Way::Thin && settings.size.is_some() {
        return Err(Unfit {
            kind: ErrorKind::Invalid,
            why: format!(
                "{} is a thin volume, whose snapshot shares the pool's room: snapshot.size does not apply",
                volume.full_name()
            ),
        });
    }
    let mut warnings = filling(volume, volumes, settings.warn);
    if !place.seen {
        warnings.push(format!(
            "that the disk's data is on {} is only what the request says; it cannot be seen from here",
            volume.full_name()
        ));
    }
    let content = content(&request.disk, place, volume)?;
    warnings.extend(content.lazy);
    Ok(Found {
        request: request.clone(),
        settings: settings.clone(),
        volume: volume.clone(),
        way,
        inside: place.inside.clone(),
        format: content.format,
        below: content.below,
        size: content.size,
        encrypted: content.encrypted,
        warnings,
    })
}

/// What is on the volume for the disk.
struct Content {
    format: String,
    below: Vec<FileInside>,
    /// The virtual size in bytes.
    size: Option<u64>,
    encrypted: bool,
    /// What is to be known of the image.
    lazy: Option<String>,
}

impl Content {
    fn of(image: &ImageFile, below: Vec<FileInside>) -> Self {
        Self {
            format: image.format().to_owned(),
            below,
            size: Some(image.size()),
            encrypted: image.qcow2.as_ref().is_some_and(|header| header.encrypted),
            lazy: image.lazy_warning(),
        }
    }
}

fn content(disk: &Disk, place: &Place, volume: &Volume) -> Result<Content, Unfit> {
    if let Some(inside) = &place.inside {
        let image = ImageFile::of(disk)?;
        let below = chain::below(&image, disk, inside)?;
        return Ok(Content::of(&image, below));
    }
    let format = disk.driver.format.as_deref();
    match format {
        Some("raw") if disk.backing.is_none() => Ok(Content {
            format: "raw".to_owned(),
            below: Vec::new(),
            size: Some(volume.size),
            encrypted: false,
            lazy: None,
        }),
        Some("raw" | "qcow2") => {
            let image = on_volume(volume, format)?;
            image.stands_alone(disk)?;
            Ok(Content::of(&image, Vec::new()))
        }
        Some(other) => Err(format!("images of the format {other} are not known to be whole").into()),
        None => Err("the domain's document does not say the image's format"
            .to_owned()
            .into()),
    }
}

/// The image that is the volume.
fn on_volume(volume: &Volume, format: Option<&str>) -> Result<ImageFile, Unfit> {
    let path = PathBuf::from(&volume.path);
    let failed = |e: std::io::Error| Unfit {
        kind: ErrorKind::of_io(&e),
        why: format!("cannot read {}: {e}", volume.path),
    };
    let file = File::open(&path).map_err(failed)?;
    let qcow2 = match format {
        Some("qcow2") => Some(Qcow2::read(&file).map_err(failed)?),
        _ => None,
    };
    let metadata = file.metadata().map_err(failed)?;
    Ok(ImageFile {
        path,
        file,
        metadata,
        qcow2,
    })
}

/// Which way a volume is snapshotted.
fn way(volume: &Volume, volumes: &[Volume]) -> Result<Way, Unfit> {
    let name = volume.full_name();
    if volume.merging {
        return Err(Unfit {
            kind: ErrorKind::Busy,
            why: format!("a snapshot is being merged into {name}, now or at its next activation"),
        });
    }
    if volume.attributes.chars().nth(4) == Some('s') {
        return Err(Unfit {
            kind: ErrorKind::Busy,
            why: format!("{name} is suspended: something else is at work on it"),
        });
    }
    if volume.is_thin() {
        return pool_is_sound(volume, volumes).map(|()| Way::Thin);
    }
    match volume.kind() {
        '-' | 'o' | 'r' | 'R' | 'm' | 'M' | 'C' => Ok(Way::Classic),
        's' => Err(format!("{name} is itself a classic snapshot, of which LVM makes no snapshots").into()),
        'p' => Err(Unfit {
            kind: ErrorKind::Busy,
            why: format!("{name} is being moved (pvmove)"),
        }),
        _ => Err(format!("LVM makes no snapshots of {name} ({})", volume.attributes).into()),
    }
}

fn pool_is_sound(volume: &Volume, volumes: &[Volume]) -> Result<(), Unfit> {
    match pool_fault(volume, volumes) {
        None => Ok(()),
        Some(why) => Err(Unfit {
            kind: ErrorKind::NoSpace,
            why,
        }),
    }
}
