//! Bare-metal guest programs: what a processor does that no host program can show.
