//! What a provider says of itself and of disks.

use std::collections::BTreeSet;
use std::future::Ready;
use std::sync::Arc;

use disksnap_core::{Capability, DiskRequest, ErrorKind, Fit, Probe, Registry};

use crate::Fixture;
use crate::stage::{Context, Stage, Step, Verdict, ensure, must_fail, name};

pub(super) fn describes_itself(fixture: &Arc<dyn Fixture>) -> Ready<Verdict> {
    std::future::ready(described(fixture))
}

fn described(fixture: &Arc<dyn Fixture>) -> Verdict {
    let provider = fixture.provider();
    let method = provider.method();
    Registry::empty()
        .add(provider)
        .context("registering it under its name")?;
    ensure!(!method.summary.trim().is_empty(), "the method has no summary");
    ensure!(
        !method.summary.contains('\n'),
        "the summary is longer than one line"
    );
    let mut keys = BTreeSet::new();
    for option in &method.options {
        ensure!(
            keys.insert(&option.key),
            "the option '{}' is listed twice",
            option.key
        );
        ensure!(
            !option.key.is_empty() && !option.key.contains(char::is_whitespace),
            "the option {:?} cannot be written",
            option.key
        );
        ensure!(
            !option.help.trim().is_empty(),
            "the option '{}' has no help",
            option.key
        );
    }
    ensure!(
        !method.capabilities.is_empty(),
        "the method offers nothing: no capabilities"
    );
    ensure!(
        fixture.provider().method() == method,
        "another instance describes itself otherwise"
    );
    Ok(())
}

pub(super) async fn capabilities(fixture: &Arc<dyn Fixture>) -> Verdict {
    let stage = Stage::new(fixture, 1).await?;
    let expected = set(&fixture.expected_capabilities());
    ensure!(!expected.is_empty(), "the fixture expects no capabilities");
    let targets = stage.targets(1);
    for probe in probe(&stage, &stage.disk_requests(&targets).await?).await? {
        let found = set(&probe.capabilities);
        ensure!(
            found == expected,
            "the disk offers {} where {} are expected",
            list(&found),
            list(&expected)
        );
    }
    let claimed = set(&fixture.provider().method().capabilities);
    ensure!(
        claimed.is_superset(&expected),
        "the method claims {} and its disks offer {}",
        list(&claimed),
        list(&expected)
    );
    stage.finish().await
}

pub(super) async fn probe_accepts(fixture: &Arc<dyn Fixture>) -> Verdict {
    let stage = Stage::new(fixture, 2).await?;
    let targets = stage.targets(2);
    let requests = stage.disk_requests(&targets).await?;
    let before = stage.live(&targets[0]).await?;
    let first = probe(&stage, &requests).await?;
    for (probe, request) in first.iter().zip(&requests) {
        let target = &request.disk.target;
        ensure!(
            !matches!(probe.fit, Fit::Unfit { .. }),
            "{target} is found {:?}",
            probe.fit
        );
        ensure!(!probe.unit.is_empty(), "{target} has no unit");
        ensure!(
            !probe.effect.is_empty(),
            "{target}: what would happen is not told"
        );
    }
    let again = probe(&stage, &requests).await?;
    for (a, b) in first.iter().zip(&again) {
        ensure!(
            (&a.fit, &a.unit, &a.capabilities) == (&b.fit, &b.unit, &b.capabilities),
            "probed again: {b:?} after {a:?}"
        );
    }
    let after = stage.live(&targets[0]).await?;
    crate::stage::same(&before, &after).context("probe changed the disk")?;
    stage.finish().await
}

pub(super) async fn probe_unfit(fixture: &Arc<dyn Fixture>) -> Verdict {
    let stage = Stage::new(fixture, 2).await?;
    let mut requests = stage.disk_requests(&stage.targets(2)).await?;
    let mut unfit = requests[0].clone();
    unfit.disk = stage.setting.unfit_disk();
    requests.insert(1, unfit);
    let probes = probe(&stage, &requests).await?;
    let fit: Vec<bool> = probes
        .iter()
        .map(|p| !matches!(p.fit, Fit::Unfit { .. }))
        .collect();
    ensure!(
        fit == [true, false, true],
        "fit, unfit and fit disks are found fit: {fit:?}"
    );
    if let Fit::Unfit { why, .. } = &probes[1].fit {
        ensure!(!why.trim().is_empty(), "the unfit disk is given no reason");
    }
    stage.finish().await
}

pub(super) async fn unknown_option(fixture: &Arc<dyn Fixture>) -> Verdict {
    let stage = Stage::new(fixture, 1).await?;
    let mut request = stage.request(&name("odd"), &stage.targets(1));
    if let disksnap_core::Disks::Named(choices) = &mut request.disks {
        choices[0].options.push("no-such-option.of-any-method", "1");
    }
    let created = stage.dispatcher()?.create(stage.domain(), &request).await;
    must_fail(created, ErrorKind::Invalid, "an unknown option")?;
    stage.finish().await
}

async fn probe(stage: &Stage, requests: &[DiskRequest]) -> Step<Vec<Probe>> {
    let control = stage.control().await?;
    let probes = stage
        .provider()
        .probe(&*control, requests)
        .await
        .context("probing")?;
    ensure!(
        probes.len() == requests.len(),
        "{} answers for {} disks",
        probes.len(),
        requests.len()
    );
    Ok(probes)
}

fn set(capabilities: &[Capability]) -> BTreeSet<Capability> {
    capabilities.iter().copied().collect()
}

fn list(capabilities: &BTreeSet<Capability>) -> String {
    let names: Vec<String> = capabilities.iter().map(ToString::to_string).collect();
    names.join(", ")
}
