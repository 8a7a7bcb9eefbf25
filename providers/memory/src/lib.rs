//! The reference provider: the smallest readable example of the contract.
