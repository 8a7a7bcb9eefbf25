//! `disksnap conform`: a method's provider against the conformance suite.

use disksnap::{Error, ErrorKind};

use crate::context::Context;
use crate::failure::Outcome;

pub(crate) async fn run(_: &Context, method: &str) -> Outcome {
    disksnap::methods()?.get(method)?;
    Err(Error::new(ErrorKind::Unsupported, "this build has no conformance suite").into())
}
