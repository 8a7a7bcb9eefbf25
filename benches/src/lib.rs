//! disksnap's benchmarks: ratios within one run.
