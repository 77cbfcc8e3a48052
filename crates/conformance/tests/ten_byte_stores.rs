//! x87 stores of ten bytes whose end is missing: what the host has written by then is what the guest has written.

use conformance::bench::Bench;
use conformance::capabilities::Capabilities;
use conformance::generate::{Case, Generator};
use conformance::layout::{CODE, DATA, PAGE};
use iced_x86::{Code, Decoder, DecoderOptions};
use silicon::model::CpuModel;

/// The page at index 4 of the data window is missing, that at index 8 is read-only; those before them can be written.
const EDGES: [u64; 2] = [DATA + 4 * PAGE, DATA + 8 * PAGE];

#[test]
fn a_store_of_ten_bytes_that_faults_writes_what_the_host_writes() {
    let features = CpuModel::parse("max").expect("a model").features();
    let mut bench = Bench::new(features, 1).expect("a host that can be compared with");
    let mut generator = Generator::new(Capabilities::of_host().expect("as above"));
    for (code, bytes) in [(Code::Fstp_m80fp, [0xdb, 0x38]), (Code::Fbstp_m80bcd, [0xdf, 0x30])] {
        for (edge, here) in EDGES.into_iter().flat_map(|edge| (0..11).map(move |here| (edge, here))) {
            for number in 0..60 {
                // The registers of a generated case, its operand at [rax].
                let Some(mut case) = generator.case(code, 1, number) else { continue };
                (case.machine.rip, case.machine.gpr[0]) = (CODE + 0x100, edge - here);
                let mut decoder = Decoder::with_ip(64, &bytes, case.machine.rip, DecoderOptions::NONE);
                let case = Case {
                    instruction: decoder.decode(),
                    bytes: bytes.to_vec(),
                    patches: Vec::new(),
                    target: Some(edge - here),
                    ..case
                };
                let outcome = bench.run(&case);
                let different = outcome.difference.defined;
                assert!(different.is_empty(), "{code:?} {here} bytes before {edge:#x}: {different:?}");
            }
        }
    }
}
