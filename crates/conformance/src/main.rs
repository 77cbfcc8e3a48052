//! `conformance`: instruction conformance of the software processor against the host's own.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use conformance::bench::Bench;
use conformance::blocks::{self, forms::Forms, writer::Programs};
use conformance::capabilities::Capabilities;
use conformance::forms::{self, Form};
use conformance::generate::Generator;
use conformance::report;
use conformance::run::{self, Plan};
use iced_x86::Code;
use indicatif::{ProgressBar, ProgressStyle};
use silicon::model::{CpuModel, Features};

/// Runs instructions on the software processor and on the host's own, and compares.
#[derive(Parser, Debug)]
#[command(version)]
struct Arguments {
    /// Programs in place of single instructions: blocks of random length with random branches, each run several times on the
    /// host, the interpreter, and translators that translate at the first and at the third run.
    #[arg(long)]
    blocks: bool,
    /// Seed of all cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Cases in all, spread evenly over the forms; by default 1000000. With --blocks, programs; by default 20000.
    #[arg(long)]
    cases: Option<u64>,
    /// First case number of each form; with --blocks, of the programs.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Go on with further cases for this long.
    #[arg(long)]
    minutes: Option<u64>,
    /// CPU model, as `ring3 boot --cpu` takes it. Models of older parts than the host differ where the parts do
    /// (x87 data pointer, width of addresses).
    #[arg(long, default_value = "max")]
    cpu: String,
    /// Only forms whose name (iced-x86's, such as `Add_rm32_r32`) or extension contains this; repeatable.
    #[arg(long)]
    filter: Vec<String>,
    /// One case, as a report names it: FORM:NUMBER, or with --blocks the number of a program.
    #[arg(long)]
    case: Option<String>,
    /// Worker processes.
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// Differences told in full for each form.
    #[arg(long, default_value_t = 2)]
    tell: u64,
    /// Differences told in full in all.
    #[arg(long, default_value_t = 200)]
    tell_all: usize,
    /// With --blocks: have the translators skip instructions of this form, to see that differences are found.
    #[arg(long)]
    plant: Option<String>,
    /// Do not print the coverage table.
    #[arg(long)]
    no_table: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = CpuModel::parse(&arguments.cpu).map_err(|e| e.to_string()).and_then(|model| {
        let features = model.features();
        match &arguments.case {
            Some(number) if arguments.blocks => one_program(&arguments, &features, number),
            Some(case) => one_case(&arguments, &features, case),
            None if arguments.blocks => {
                repeated(&arguments, |round| many_programs(&arguments, &features, round))
            }
            None => repeated(&arguments, |round| many_cases(&arguments, &features, round)),
        }
    });
    match result {
        Ok(code) => code,
        Err(message) => {
            eprintln!("conformance: {message}");
            ExitCode::from(2)
        }
    }
}

fn chosen(form: &Form, filter: &[String]) -> bool {
    let name = format!("{:?} {}", form.code, form.group()).to_lowercase();
    filter.is_empty() || filter.iter().any(|f| name.contains(&f.to_lowercase()))
}

/// Runs once, or again and again for --minutes; stops at the first round that finds something.
fn repeated(
    arguments: &Arguments,
    mut round: impl FnMut(u64) -> Result<bool, String>,
) -> Result<ExitCode, String> {
    let end = arguments.minutes.map(|minutes| Instant::now() + Duration::from_secs(60 * minutes));
    for number in 0.. {
        if !round(number)? {
            return Ok(ExitCode::FAILURE);
        }
        if end.is_none_or(|end| Instant::now() >= end) {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn progress_bar(count: u64) -> ProgressBar {
    let bar = ProgressBar::new(count);
    if let Ok(style) =
        ProgressStyle::with_template("{bar:40} {human_pos}/{human_len} cases, {per_sec}, {eta}")
    {
        bar.set_style(style);
    }
    bar
}

fn chosen_forms(arguments: &Arguments, features: &Features) -> Vec<Form> {
    forms::all(features).into_iter().filter(|form| chosen(form, &arguments.filter)).collect()
}

fn many_programs(arguments: &Arguments, features: &Features, round: u64) -> Result<bool, String> {
    let programs = arguments.cases.unwrap_or(20_000);
    let plan = blocks::run::Plan {
        seed: arguments.seed,
        first: arguments.first + round * programs,
        programs,
        forms: chosen_forms(arguments, features),
        workers: arguments.workers.max(1),
        told: arguments.tell,
        planted: planted(arguments)?,
    };
    if Forms::new(&plan.forms).count() == 0 {
        return Err("no form that programs have has that name".into());
    }
    let bar = progress_bar(plan.programs);
    let summary =
        blocks::run::run(&plan, features, |done| bar.set_position(done)).map_err(|e| e.to_string())?;
    bar.finish_and_clear();
    for line in &summary.told {
        println!("{line}");
    }
    for crash in &summary.crashes {
        println!("CRASH {crash}");
    }
    println!(
        "{} programs of {} instructions, {} runs of which {} on the host and {} with a fault, {} instructions executed: \
         {} different, {} endless, {} workers crashed",
        summary.programs,
        summary.length,
        summary.runs,
        summary.native,
        summary.faults,
        summary.instructions,
        summary.different,
        summary.endless,
        summary.crashes.len(),
    );
    Ok(summary.is_clean())
}

fn form_named(name: &str) -> Result<Code, String> {
    let code = Code::values().find(|code| format!("{code:?}") == name);
    code.ok_or_else(|| format!("there is no form {name}"))
}

fn planted(arguments: &Arguments) -> Result<Option<Code>, String> {
    arguments.plant.as_deref().map(form_named).transpose()
}

fn one_program(arguments: &Arguments, features: &Features, number: &str) -> Result<ExitCode, String> {
    let number: u64 = number.parse().map_err(|_| format!("{number} is no number of a program"))?;
    let forms = Forms::new(&chosen_forms(arguments, features));
    let host = Capabilities::of_host().map_err(|e| e.to_string())?;
    let mut program = Programs::new(host, forms).program(arguments.seed, number);
    for line in program.disassemble() {
        println!("{line}");
    }
    let mut bench = blocks::bench::Bench::new(features.clone(), arguments.seed).map_err(|e| e.to_string())?;
    bench.plant(planted(arguments)?);
    let outcome = bench.run(&mut program);
    println!(
        "{} runs, {} on the host, {} with a fault; {} instructions executed",
        outcome.runs, outcome.native, outcome.faults, outcome.instructions
    );
    let Some(difference) = outcome.difference else {
        return Ok(if outcome.endless { ExitCode::FAILURE } else { ExitCode::SUCCESS });
    };
    for line in blocks::run::tell(&mut bench, arguments.seed, number, &program, &difference) {
        println!("{line}");
    }
    Ok(ExitCode::FAILURE)
}

fn many_cases(arguments: &Arguments, features: &Features, round: u64) -> Result<bool, String> {
    let all = chosen_forms(arguments, features);
    let comparable = run::comparable(&all);
    if comparable.is_empty() {
        return Err("no form that can be compared has that name".into());
    }
    let cases_per_form = arguments.cases.unwrap_or(1_000_000).div_ceil(comparable.len() as u64);
    let plan = Plan {
        seed: arguments.seed,
        cases_per_form,
        forms: comparable,
        workers: arguments.workers.max(1),
        told_per_form: arguments.tell,
        first: arguments.first + round * cases_per_form,
    };
    let bar = progress_bar(plan.cases_per_form * plan.forms.len() as u64);
    let summary = run::run(&plan, features, |done| bar.set_position(done)).map_err(|e| e.to_string())?;
    bar.finish_and_clear();
    for told in summary.told.iter().take(arguments.tell_all) {
        println!("DIFFERENT {told}");
    }
    for crash in &summary.crashes {
        println!("CRASH {crash}");
    }
    if !arguments.no_table && round == 0 {
        let host = Capabilities::of_host().map_err(|e| e.to_string())?;
        println!("{}", report::coverage(&all, &summary, &host));
    }
    let untested = report::untested(&summary);
    let undefined: u64 = summary.forms.iter().map(|f| f.undefined).sum();
    let excepted: u64 = summary.forms.iter().map(|f| f.excepted).sum();
    println!(
        "{} cases of {} forms: {} different, {} forms untested, {} workers crashed; \
         architecturally undefined bits differ in {} cases, what this host's maker does otherwise in {}",
        summary.cases(),
        plan.forms.len(),
        summary.differences(),
        untested,
        summary.crashes.len(),
        undefined,
        excepted,
    );
    Ok(summary.differences() == 0 && untested == 0 && summary.crashes.is_empty())
}

fn one_case(arguments: &Arguments, features: &Features, case: &str) -> Result<ExitCode, String> {
    let (name, number) = case.split_once(':').ok_or("--case wants FORM:NUMBER")?;
    let number: u64 = number.parse().map_err(|_| format!("{number} is no case number"))?;
    let code = form_named(name)?;
    let host = Capabilities::of_host().map_err(|e| e.to_string())?;
    let case =
        Generator::new(host).case(code, arguments.seed, number).ok_or("this form cannot be encoded")?;
    println!("{}", report::disassemble(&case));
    println!("{:x?}", case.machine);
    for (address, bytes) in &case.patches {
        println!("{address:#x}: {bytes:02x?}");
    }
    let mut bench = Bench::new(features.clone(), arguments.seed).map_err(|e| e.to_string())?;
    let outcome = bench.run(&case);
    println!("host:  {} at {:#x}", outcome.host.0, outcome.host.1.rip);
    if let Some((event, machine)) = &outcome.guest {
        println!("guest: {event} at {:#x}", machine.rip);
    }
    println!("{}", report::tell(arguments.seed, number, &case, &outcome));
    let same = outcome.difference.defined.is_empty();
    Ok(if same { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
