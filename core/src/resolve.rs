//! Which disks a request means, and which method snapshots each: the caller's override, else the
//! disk's own `<diskSnapshot>`, else the default for that disk.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::names::nearest;
use crate::{
    Alias, Capability, DeviceKind, Disk, DiskChoice, DiskRequest, Disks, Error, ErrorKind, Fit, Host, Method,
    MethodChoice, Options, Probe, Registry, Result, SnapshotRequest,
};

/// What a request would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The disks it means, in the domain's order.
    pub disks: Vec<PlannedDisk>,
    /// The domain's other disks, and why they are left out.
    pub skipped: Vec<Skipped>,
}

/// One disk of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedDisk {
    /// The disk as its provider will see it.
    pub request: DiskRequest,
    /// The method; `None` where no method suits the disk.
    pub method: Option<String>,
    /// Why this method.
    pub why: Why,
    /// What its provider found out.
    pub probe: Probe,
}

/// Why a disk has its method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Why {
    /// The caller said so.
    Override,
    /// The disk's own `<diskSnapshot>` says so.
    Disk,
    /// It is the default for that disk.
    Default,
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Override => "asked for",
            Self::Disk => "the disk's own",
            Self::Default => "default for this disk",
        })
    }
}

/// A disk that a request leaves out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The disk's target.
    pub target: String,
    /// Why.
    pub reason: String,
}

/// A disk that the request means, before anyone was asked about it.
struct Chosen {
    request: DiskRequest,
    method: Option<String>,
    why: Why,
}

/// Works out the plan; asks the providers, changes nothing.
pub(crate) async fn resolve(
    host: &dyn Host,
    registry: &Registry,
    request: &SnapshotRequest,
    taken: &BTreeSet<String>,
) -> Result<Plan> {
    let (mut chosen, skipped) = choose(host, &request.disks, taken)?;
    for disk in &mut chosen {
        if let Some(named) = &mut disk.method {
            let method = registry
                .get(named)
                .map_err(|e| e.with("disk", &disk.request.disk.target))?
                .method();
            check_options(&method, &disk.request)?;
            // From here on an alias is the method itself.
            *named = method.name;
        } else {
            check_any_knows(registry, &disk.request)?;
        }
    }
    let disks = ask(host, registry, chosen).await?;
    Ok(Plan { disks, skipped })
}

fn choose(host: &dyn Host, wanted: &Disks, taken: &BTreeSet<String>) -> Result<(Vec<Chosen>, Vec<Skipped>)> {
    let domain = host.domain();
    let choices = match wanted {
        Disks::Writable => None,
        Disks::Named(choices) => Some(check_choices(host, choices)?),
    };
    let (mut chosen, mut skipped, mut aliases) = (Vec::new(), Vec::new(), taken.clone());
    for disk in &domain.disks {
        let choice = match choices {
            None => match reason_to_skip(disk) {
                None => None,
                Some(reason) => {
                    skipped.push(Skipped {
                        target: disk.target.clone(),
                        reason,
                    });
                    continue;
                }
            },
            Some(choices) => match choices.iter().find(|c| c.target == disk.target) {
                None => {
                    skipped.push(Skipped {
                        target: disk.target.clone(),
                        reason: "not named".to_owned(),
                    });
                    continue;
                }
                found => found,
            },
        };
        let alias = Alias::generate(disk.alias.as_ref().unwrap_or(&disk.target), |name| {
            aliases.contains(name)
        });
        aliases.insert(alias.0.clone());
        chosen.push(choose_method(disk, choice, alias));
    }
    if chosen.is_empty() {
        return Err(Error::new(ErrorKind::Invalid, "there is no disk to snapshot").with("domain", &domain.id).hint(
            "CD-ROMs, floppies, read-only and shareable disks and empty drives are left out unless they are named.",
        ));
    }
    Ok((chosen, skipped))
}

fn check_choices<'a>(host: &dyn Host, choices: &'a [DiskChoice]) -> Result<&'a [DiskChoice]> {
    for (n, choice) in choices.iter().enumerate() {
        let disk = host.domain().disk(&choice.target)?;
        let refuse =
            |kind, why: &str| Err(Error::new(kind, format!("the disk {why}")).with("disk", &choice.target));
        if choices[..n].iter().any(|c| c.target == choice.target) {
            return refuse(ErrorKind::Invalid, "is named twice");
        }
        if disk.source.is_none() {
            return refuse(ErrorKind::Invalid, "has no medium to snapshot");
        }
    }
    Ok(choices)
}

pub(crate) fn reason_to_skip(disk: &Disk) -> Option<String> {
    let reason = match disk.device {
        DeviceKind::Cdrom => "a CD-ROM drive",
        DeviceKind::Floppy => "a floppy drive",
        _ if disk.source.is_none() => "an empty drive",
        _ if disk.read_only => "read-only",
        _ if disk.shareable => "shareable: other domains may write it",
        _ => return None,
    };
    Some(reason.to_owned())
}

fn choose_method(disk: &Disk, choice: Option<&DiskChoice>, alias: Alias) -> Chosen {
    let extra = choice.map(|c| c.options.clone()).unwrap_or_default();
    let (method, why, options) = match (choice.and_then(|c| c.method.as_ref()), &disk.method) {
        (Some(MethodChoice { method, options }), _) => {
            (Some(method.clone()), Why::Override, merge(options, &extra))
        }
        (None, Some(MethodChoice { method, options })) => {
            (Some(method.clone()), Why::Disk, merge(options, &extra))
        }
        (None, None) => (None, Why::Default, extra),
    };
    Chosen {
        request: DiskRequest {
            disk: disk.clone(),
            alias,
            options,
        },
        method,
        why,
    }
}

/// What `extra` says wins over what `base` says of the same key.
fn merge(base: &Options, extra: &Options) -> Options {
    let kept = base.iter().filter(|(key, _)| extra.get(key).is_none());
    kept.chain(extra.iter()).collect()
}

fn check_options(method: &Method, request: &DiskRequest) -> Result<()> {
    let known: Vec<&str> = method.options.iter().map(|o| o.key.as_str()).collect();
    match request.options.offender(&known) {
        None => Ok(()),
        Some(key) if known.contains(&key) => Err(Error::new(
            ErrorKind::Invalid,
            format!("the option '{key}' is given twice"),
        )
        .by(&method.name)
        .with("disk", &request.disk.target)),
        Some(key) => Err(
            Error::new(ErrorKind::Invalid, format!("the method has no option '{key}'"))
                .by(&method.name)
                .with("disk", &request.disk.target)
                .hint(nearest("options", key, known.iter().copied())),
        ),
    }
}

/// Asks the providers about all disks, each provider once.
async fn ask(host: &dyn Host, registry: &Registry, chosen: Vec<Chosen>) -> Result<Vec<PlannedDisk>> {
    let mut candidates: Vec<Vec<(String, Probe)>> = chosen.iter().map(|_| Vec::new()).collect();
    for (name, provider) in registry.iter() {
        let method = provider.method();
        let concerned: Vec<usize> = (0..chosen.len())
            .filter(|&n| match &chosen[n].method {
                Some(wanted) => wanted == name,
                None => check_options(&method, &chosen[n].request).is_ok(),
            })
            .collect();
        if concerned.is_empty() {
            continue;
        }
        let requests: Vec<DiskRequest> = concerned.iter().map(|&n| chosen[n].request.clone()).collect();
        let probes = provider
            .probe(host, &requests)
            .await
            .map_err(|e| e.by(name).during("probe"))?;
        if probes.len() != requests.len() {
            return Err(Error::new(
                ErrorKind::Internal,
                "the provider answered for another number of disks",
            )
            .by(name));
        }
        for (n, probe) in concerned.into_iter().zip(probes) {
            candidates[n].push((name.to_owned(), probe));
        }
    }
    Ok(chosen
        .into_iter()
        .zip(candidates)
        .map(|(disk, candidates)| settle(disk, candidates))
        .collect())
}

/// The best of what the providers said of one disk.
fn settle(chosen: Chosen, mut candidates: Vec<(String, Probe)>) -> PlannedDisk {
    let Chosen { request, method, why } = chosen;
    // Of several that suit as well, one that leaves the domain its disk: nobody wants another by default.
    candidates.sort_by_key(|(_, probe)| {
        let fit = match probe.fit {
            Fit::Natural => 0,
            Fit::Possible => 1,
            Fit::Unfit { .. } => 2,
        };
        (fit, probe.capabilities.contains(&Capability::Merge))
    });
    let suits = |(_, probe): &(String, Probe)| !matches!(probe.fit, Fit::Unfit { .. });
    if method.is_none() && !candidates.first().is_some_and(suits) {
        let probe = none_suits(&candidates);
        return PlannedDisk {
            request,
            method: None,
            why,
            probe,
        };
    }
    let (name, probe) = candidates.swap_remove(0);
    PlannedDisk {
        request,
        method: Some(name),
        why,
        probe,
    }
}

/// Why no method suits a disk. What could be otherwise tomorrow counts for more than what never works.
fn none_suits(candidates: &[(String, Probe)]) -> Probe {
    let (mut kind, mut reasons) = (ErrorKind::Unsupported, Vec::new());
    for (name, probe) in candidates {
        if let Fit::Unfit { kind: its, why } = &probe.fit {
            reasons.push(format!("{name}: {why}"));
            if kind == ErrorKind::Unsupported {
                kind = *its;
            }
        }
    }
    Probe::refused(kind, reasons.join("; "))
}

/// For disks of no named method: every option must be one that some method knows, and one method must know all.
fn check_any_knows(registry: &Registry, request: &DiskRequest) -> Result<()> {
    let methods: Vec<Method> = registry.iter().map(|(_, provider)| provider.method()).collect();
    if methods
        .iter()
        .any(|method| check_options(method, request).is_ok())
    {
        return Ok(());
    }
    let known: Vec<&str> = methods
        .iter()
        .flat_map(|m| &m.options)
        .map(|o| o.key.as_str())
        .collect();
    let error = match request.options.offender(&known) {
        Some(key) if known.contains(&key) => {
            Error::new(ErrorKind::Invalid, format!("the option '{key}' is given twice"))
        }
        Some(key) => Error::new(ErrorKind::Invalid, format!("no method has the option '{key}'"))
            .hint(nearest("options", key, known.into_iter())),
        None => Error::new(
            ErrorKind::Invalid,
            "no one method has all the options that were given",
        )
        .hint("Name the method; `disksnap methods METHOD` lists its options."),
    };
    Err(error.with("disk", &request.disk.target))
}
