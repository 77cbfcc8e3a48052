//! Project tasks: `cargo xtask demo`, `test`, `bench`, `fuzz`, `selftests`, `kvm-ioctls`, `vmms`, `linux-driver`.

mod bench;
mod crate_tests;
mod demo;
mod fuzz;
mod linux_driver;
mod selftests;
mod test;
mod verdicts;
mod vmms;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "ring3's project tasks", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Boot an unmodified Debian kernel on ring3 and show its console.
    Demo(demo::Options),
    /// Run everything that CI runs.
    Test(test::Options),
    /// Measure against QEMU's TCG and against no guest, in interleaved runs, and print ratios.
    Bench(bench::Options),
    /// Compare generated instructions with the host's CPU, and run random guest images, for a while.
    Fuzz(fuzz::Options),
    /// Run the Linux kernel's own KVM tests under `ring3 run`.
    Selftests(selftests::Options),
    /// Run the kvm-ioctls crate's tests under `ring3 run`.
    KvmIoctls(crate_tests::Options),
    /// Build VMMs that Debian has no packages of from their source, and boot Debian's kernel on each under `ring3 run`.
    Vmms,
    /// Build the Linux guest driver of the page-not-present protocol for Debian's kernel, and run it.
    LinuxDriver,
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Demo(options) => demo::run(&options),
        Task::Test(options) => test::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Selftests(options) => selftests::run(&options),
        Task::KvmIoctls(options) => crate_tests::run(&options),
        Task::Vmms => vmms::run(),
        Task::LinuxDriver => linux_driver::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
