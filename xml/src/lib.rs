//! disksnap's XML documents to core types and back.
//!
//! | document | read | written |
//! | --- | --- | --- |
//! | `<domain>` | [`DomainDocument::parse`] | edits in place: [`DomainDocument::with_exports`], …, [`DomainDocument::restored`] |
//! | `<domainblocksnapshot>` | [`snapshot_request`] | [`snapshot_document`], [`snapshots_document`] |
//! | `<blockexport>` | [`export_request`] | [`export_document`] |
//! | `<domaincheckpoint>`, `<domaincheckpoints>` | [`checkpoints`] | [`checkpoints_document`] |
//! | what a merge or revert changed | | [`altered_element`] |
//! | `<diskSnapshotPlan>`, `<diskSnapshotMethods>` | | [`plan_document`], [`methods_document`] |
//!
//! The reference of all elements and attributes is `docs/xml.md`. Every fault of a document is an
//! [`Error`](disksnap_core::Error) of the kind `Invalid` whose context names `line`, `column` and
//! `element`, and whose message says what was expected. No DTD is read, no entity beyond XML's five,
//! and nothing beyond the limits: [`MAX_BYTES`], [`MAX_DEPTH`], [`MAX_MARKUP`], [`MAX_ATTRIBUTES`],
//! [`MAX_NAMESPACES`]; sets of checkpoints have wider ones, [`MAX_SET_BYTES`], [`MAX_SET_MARKUP`]. In disksnap's own documents an unknown element is an error; in a `<domain>` it
//! is carried along.

mod altered;
mod block_export;
mod block_snapshot;
mod checkpoints;
mod disk;
mod domain;
mod edit;
mod limits;
mod lists;
mod machine;
mod method;
mod source;
mod splice;
mod tree;
mod write;

pub use altered::altered_element;
pub use block_export::{export_document, export_request, export_request_document, serving_document};
pub use block_snapshot::{SnapshotView, snapshot_document, snapshot_request, snapshots_document};
pub use checkpoints::{checkpoints, checkpoints_document};
pub use disk::new_disk_element;
pub use domain::{DOMAIN_NAMESPACE, DomainDocument, set_text_of, text_of};
pub use edit::disk_element;
pub use limits::{
    MAX_ATTRIBUTES, MAX_BYTES, MAX_DEPTH, MAX_MARKUP, MAX_NAMESPACES, MAX_SET_BYTES, MAX_SET_MARKUP,
};
pub use lists::{methods_document, plan_document};
pub use machine::{EfiVariables, RestoredAs, RestoredDisk, Tpm, TpmPlace};
pub use method::disk_snapshot_element;
pub use source::{backing_store_element, source_element};
pub use write::Element;
