//! ring3 abi.
