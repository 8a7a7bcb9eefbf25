//! Documents that are only written: what a request would do, and what methods there are.

use disksnap_core::{Domain, Fit, Method, Plan, PlannedDisk, Result};

use crate::block_snapshot::detail_element;
use crate::write::Element;

/// A `<diskSnapshotPlan>` document: per disk the method, why that one, and what would happen.
///
/// # Errors
/// `Unsupported` for text that XML cannot hold.
pub fn plan_document(domain: &Domain, plan: &Plan) -> Result<String> {
    let skipped = plan
        .skipped
        .iter()
        .map(|s| Element::new("skipped").attr("disk", &s.target).text(&s.reason));
    Element::new("diskSnapshotPlan")
        .child(
            Element::new("domain")
                .attr("name", &domain.id.name)
                .attr("uuid", domain.id.uuid),
        )
        .children(plan.disks.iter().map(planned))
        .children(skipped)
        .to_document()
}

fn planned(disk: &PlannedDisk) -> Element {
    let probe = &disk.probe;
    let (fit, reason) = match &probe.fit {
        Fit::Natural => ("natural", None),
        Fit::Possible => ("possible", None),
        Fit::Unfit { why, .. } => ("unfit", Some(Element::new("reason").text(why))),
    };
    let effect = (!probe.effect.is_empty()).then(|| Element::new("effect").text(&probe.effect));
    let options = disk.request.options.iter();
    Element::new("snapshot")
        .attr("disk", &disk.request.disk.target)
        .attr_if("method", disk.method.as_ref())
        .attr("why", why(disk.why))
        .attr("fit", fit)
        .attr_if("unit", Some(&probe.unit).filter(|unit| !unit.is_empty()))
        .child(Element::new("alias").attr("name", &disk.request.alias))
        .children(reason)
        .children(effect)
        .children(options.map(|(key, value)| Element::new("option").attr("name", key).attr("value", value)))
        .children(probe.capabilities.iter().copied().map(capability))
        .children(
            probe
                .details
                .iter()
                .map(|(key, value)| detail_element(key, value)),
        )
        .children(probe.warnings.iter().map(|w| Element::new("warning").text(w)))
}

fn why(why: disksnap_core::Why) -> &'static str {
    match why {
        disksnap_core::Why::Override => "override",
        disksnap_core::Why::Disk => "disk",
        disksnap_core::Why::Default => "default",
    }
}

fn capability(capability: disksnap_core::Capability) -> Element {
    Element::new("capability").attr("name", capability)
}

/// A `<diskSnapshotMethods>` document: each method, what it offers and what it can be told.
///
/// # Errors
/// `Unsupported` for text that XML cannot hold.
pub fn methods_document<'a>(methods: impl IntoIterator<Item = &'a Method>) -> Result<String> {
    let methods = methods.into_iter().map(|method| {
        let options = method.options.iter();
        Element::new("method")
            .attr("name", &method.name)
            .child(Element::new("summary").text(&method.summary))
            .children(method.capabilities.iter().copied().map(capability))
            .children(options.map(|o| Element::new("option").attr("name", &o.key).text(&o.help)))
    });
    Element::new("diskSnapshotMethods")
        .children(methods)
        .to_document()
}
