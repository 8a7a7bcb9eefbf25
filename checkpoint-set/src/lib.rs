//! Sets of checkpoints as files that carry no `<domain>`: JSON of our own ([`json`]), and oVirt's tables ([`ovirt`]).
//! libvirt's XML form is in `disksnap-xml`.
//!
//! Source: `seeds/bulk-checkpoint-redefine.txt`. `docs/checkpoint-sets.md` describes both forms.
//!
//! What is read is read in a stream, and never more than [`MAX_BYTES`] of it. A fault names the line, or the table and
//! the record, and what was expected there. Whether a set is sound is not looked at here:
//! [`Lineage::new`](disksnap_core::Lineage::new) does.

pub mod json;
pub mod ovirt;

mod input;
mod time;

pub use input::MAX_BYTES;
