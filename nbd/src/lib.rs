//! An asynchronous NBD client: pipelined reads, block status and dirty-bitmap contexts, TLS.
