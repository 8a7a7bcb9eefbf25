//! disksnap's XML documents to core types and back.
