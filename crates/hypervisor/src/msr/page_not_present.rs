//! The registers of the page-not-present protocol (docs/features/page-not-present.md).

use super::table::Slot;
use super::{MsrEnv, MsrState};
use crate::cpuid::own;

/// PNP_VECTORS: bits 7:0 the event's, bits 15:8 the interrupt's.
pub(crate) const VECTORS: u32 = 0x5233_0100;
/// PNP_RING: bits 63:12 its address, bits 3:0 its order.
pub(crate) const RING: u32 = 0x5233_0101;
/// PNP_DATA: bits 63:6 the address of the guest's data, and the bits below.
pub(crate) const DATA: u32 = 0x5233_0102;
/// PNP_REQUEST: a page, and what becomes of it.
pub(crate) const REQUEST: u32 = 0x5233_0103;

/// Bits of PNP_DATA: the protocol is on.
const ENABLED: u64 = 1 << 0;
/// The processor delivers the events, as #VE.
const VE: u64 = 1 << 1;
/// #MC for a failed page that cannot be told otherwise.
const MC: u64 = 1 << 2;
const DATA_RESERVED: u64 = 0b111 << 3;
const DATA_ADDRESS: u64 = !0x3f;
/// Bits of PNP_RING.
const RING_ORDER: u64 = 0xf;
/// 64 tokens: so many pages a vCPU is told of at most.
const RING_ORDER_MAX: u64 = 6;
const RING_RESERVED: u64 = 0xff0;
const RING_ADDRESS: u64 = !0xfff;
/// Vectors below are no interrupts'.
const VECTOR_LEAST: u64 = 16;

/// What a guest has set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Setup {
    /// Address of `page_not_present_data`, or of the virtualization-exception information area.
    pub(crate) data: u64,
    /// Address of the ring.
    pub(crate) ring: u64,
    /// Tokens, a power of two.
    pub(crate) tokens: u32,
    /// Vectors of the event and of the interrupt.
    pub(crate) event: u8,
    /// Likewise.
    pub(crate) interrupt: u8,
    /// The processor delivers the event.
    pub(crate) ve: bool,
    /// #MC may come for a failed page.
    pub(crate) mc: bool,
}

impl MsrState {
    /// What the guest has set up, if the protocol is on.
    #[inline]
    pub(crate) fn page_not_present(&self) -> Option<Setup> {
        let data = self.get(Slot::PnpData);
        if data & ENABLED == 0 {
            return None;
        }
        let (ring, vectors) = (self.get(Slot::PnpRing), self.get(Slot::PnpVectors));
        Some(Setup {
            data: data & DATA_ADDRESS,
            ring: ring & RING_ADDRESS,
            tokens: 1 << (ring & RING_ORDER),
            event: vectors as u8,
            interrupt: (vectors >> 8) as u8,
            ve: data & VE != 0,
            mc: data & MC != 0,
        })
    }

    /// PNP_DATA is zero again: what the guest wrote cannot be.
    pub(crate) fn clear_page_not_present(&mut self) {
        self.put(Slot::PnpData, 0);
    }

    /// What the guest has written to PNP_REQUEST, and what it is to read there.
    pub(crate) fn pnp_request(&self) -> u64 {
        self.get(Slot::PnpRequest)
    }

    /// The answer.
    pub(crate) fn answer_pnp_request(&mut self, answer: u64) {
        self.put(Slot::PnpRequest, answer);
    }
}

/// The guest can change it while the protocol is off, the client at any time.
fn write(state: &mut MsrState, slot: Slot, value: u64, valid: bool, host: bool, env: &dyn MsrEnv) -> bool {
    let free = host || state.get(Slot::PnpData) & ENABLED == 0;
    let valid = valid && free && (value == 0 || env.has_lapic());
    if valid {
        state.put(slot, value);
    }
    valid
}

pub(super) fn write_vectors(
    state: &mut MsrState,
    _: u32,
    value: u64,
    host: bool,
    env: &mut dyn MsrEnv,
) -> bool {
    let is_vector = |value: u64| value & 0xff >= VECTOR_LEAST;
    let valid = value == 0 || value >> 16 == 0 && is_vector(value) && is_vector(value >> 8);
    write(state, Slot::PnpVectors, value, valid, host, env)
}

pub(super) fn write_ring(state: &mut MsrState, _: u32, value: u64, host: bool, env: &mut dyn MsrEnv) -> bool {
    let valid = value & RING_RESERVED == 0 && value & RING_ORDER <= RING_ORDER_MAX;
    write(state, Slot::PnpRing, value, valid, host, env)
}

/// Whether there is memory is for the vCPU to see.
pub(super) fn write_data(state: &mut MsrState, _: u32, value: u64, host: bool, env: &mut dyn MsrEnv) -> bool {
    let ready = host || value & ENABLED == 0 || state.get(Slot::PnpVectors) != 0;
    let offered = value & VE == 0 || env.own_features() & own::PAGE_NOT_PRESENT_VE != 0;
    let valid = value & DATA_RESERVED == 0 && offered && ready && (value == 0 || env.has_lapic());
    if valid {
        state.put(Slot::PnpData, value);
    }
    valid
}

pub(super) fn write_request(
    state: &mut MsrState,
    _: u32,
    value: u64,
    host: bool,
    _: &mut dyn MsrEnv,
) -> bool {
    let valid = host || state.page_not_present().is_some_and(|setup| setup.ve);
    if valid {
        state.put(Slot::PnpRequest, value);
    }
    valid
}
