//! The suite that every disksnap provider passes.
