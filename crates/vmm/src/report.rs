//! How a machine ended, and what it did until then.

use std::fmt;
use std::time::Duration;

use crate::host::events::HostEnd;
use crate::memory::Size;

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest wrote to the debug-exit port.
    DebugExit(u32),
    /// The host ended it: Ctrl-A x or a signal.
    Host(HostEnd),
    /// A triple fault.
    TripleFault {
        /// Which virtual CPU.
        cpu: u32,
        /// Its registers.
        registers: String,
    },
    /// Something that must not happen.
    InternalError {
        /// Which virtual CPU.
        cpu: u32,
        /// What happened.
        reason: String,
        /// Its registers.
        registers: String,
    },
}

/// Figures of a finished run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Statistics {
    /// From process start to the first guest instruction.
    pub startup: Duration,
    /// From the first guest instruction to the end.
    pub wall: Duration,
    /// CPU time of the whole process, start-up included.
    pub cpu: Duration,
    /// Instructions of each virtual CPU.
    pub instructions: Vec<u64>,
    /// Exits from guest mode by reason, all virtual CPUs.
    pub exits: Vec<(&'static str, u64)>,
    /// Interrupts injected.
    pub interrupts: u64,
    /// Times that a virtual CPU slept.
    pub halts: u64,
    /// Bus locks that the guest has taken.
    pub bus_locks: u64,
    /// Split locks by what became of them.
    pub split_locks: Vec<(&'static str, u64)>,
    /// How long virtual CPUs were held back for either.
    pub throttled: Duration,
    /// How often the state of a virtual CPU was saved and restored.
    pub moves: u64,
    /// Pages of guest memory that were elsewhere and have come.
    pub brought: u64,
    /// Guest memory in bytes.
    pub guest_memory: u64,
    /// Largest resident size of the process in bytes, if the host tells.
    pub peak_resident: Option<u64>,
}

/// What is left of a machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Why it ended.
    pub outcome: Outcome,
    /// What it did.
    pub statistics: Statistics,
}

impl Statistics {
    /// Instructions of all virtual CPUs.
    pub fn total_instructions(&self) -> u64 {
        self.instructions.iter().sum()
    }

    /// Million instructions per second of CPU time.
    pub fn mips(&self) -> f64 {
        let seconds = self.cpu.as_secs_f64();
        if seconds > 0.0 { self.total_instructions() as f64 / seconds / 1e6 } else { 0.0 }
    }
}

/// A number with its digits in groups of three.
struct Grouped(u64);

impl fmt::Display for Grouped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        let mut text = String::new();
        for (i, digit) in digits.chars().enumerate() {
            if i != 0 && (digits.len() - i).is_multiple_of(3) {
                text.push(' ');
            }
            text.push(digit);
        }
        f.pad(&text)
    }
}

impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, value: String| writeln!(f, "  {name:<22} {value}");
        row("start-up", format!("{:.1} ms", self.startup.as_secs_f64() * 1e3))?;
        row("run time", format!("{:.3} s", self.wall.as_secs_f64()))?;
        row("CPU time", format!("{:.3} s", self.cpu.as_secs_f64()))?;
        row("instructions", Grouped(self.total_instructions()).to_string())?;
        if self.instructions.len() > 1 {
            for (id, count) in self.instructions.iter().enumerate() {
                row(&format!("  vCPU {id}"), Grouped(*count).to_string())?;
            }
        }
        row("speed", format!("{:.1} MIPS", self.mips()))?;
        row("guest memory", Size(self.guest_memory).to_string())?;
        if let Some(bytes) = self.peak_resident {
            row("peak resident memory", format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)))?;
        }
        row("interrupts injected", Grouped(self.interrupts).to_string())?;
        row("sleeps in HLT", Grouped(self.halts).to_string())?;
        if self.bus_locks != 0 {
            row("bus locks", Grouped(self.bus_locks).to_string())?;
        }
        for (name, count) in self.split_locks.iter().filter(|(_, count)| *count != 0) {
            row(&format!("split locks {name}"), Grouped(*count).to_string())?;
        }
        if !self.throttled.is_zero() {
            row("held back for them", format!("{:.3} s", self.throttled.as_secs_f64()))?;
        }
        if self.moves != 0 {
            row("virtual CPUs moved", Grouped(self.moves).to_string())?;
        }
        if self.brought != 0 {
            row("pages brought", Grouped(self.brought).to_string())?;
        }
        let total = self.exits.iter().map(|(_, count)| count).sum();
        row("exits", Grouped(total).to_string())?;
        for (name, count) in self.exits.iter().filter(|(_, count)| *count != 0) {
            row(&format!("  {name}"), Grouped(*count).to_string())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_readable() {
        let statistics = Statistics {
            startup: Duration::from_micros(12_340),
            wall: Duration::from_millis(2_500),
            cpu: Duration::from_secs(2),
            instructions: vec![1_234_567_890, 10],
            exits: vec![("HLT", 1000), ("CPUID", 0)],
            split_locks: vec![("warned", 7), ("emulated", 0)],
            throttled: Duration::from_millis(70),
            guest_memory: 512 << 20,
            peak_resident: Some(100 << 20),
            ..Statistics::default()
        };
        let text = statistics.to_string();
        for line in [
            "12.3 ms",
            "2.500 s",
            "1 234 567 900",
            "617.3 MIPS",
            "512 MiB",
            "100.0 MiB",
            "HLT",
            "split locks warned",
            "0.070 s",
        ] {
            assert!(text.contains(line), "{text}");
        }
        assert!(
            !text.contains("CPUID") && !text.contains("emulated") && !text.contains("bus locks"),
            "{text}"
        );
        assert_eq!(Grouped(0).to_string() + &Grouped(100).to_string(), "0100");
    }
}
