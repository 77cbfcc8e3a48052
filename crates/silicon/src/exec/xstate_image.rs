//! XSAVE images that somebody outside guest mode saves and restores: the standard format, with every component
//! whatever XCR0 enables, as a hypervisor migrates them.

use crate::cpu::Cpu;
use crate::exec::xsave_area::{self as area};
use crate::hostexec::{MXCSR_DEFINED, MXCSR_RESET};
use crate::model::xstate::{AVX, COMPONENTS, LEGACY_AND_HEADER, SSE, TILEDATA, X87 as FPU, size_standard};
use crate::state::X87;
use crate::tiles::TileDataError;

/// Where the header is: XSTATE_BV, XCOMP_BV and six words that are zero.
const HEADER: usize = 512;
/// Vector registers below 16 that an image has, whatever the mode.
const REGISTERS: usize = 16;

/// Why an image cannot be loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XstateError {
    /// XSTATE_BV has components that are not among those allowed.
    #[error("the image has components {0:#x}, which there are not")]
    Components(u64),
    /// XCOMP_BV or a reserved word of the header is not zero, or the image is too short for its components.
    #[error("the header of the image is not of the standard format")]
    Header,
    /// MXCSR has reserved bits set.
    #[error("MXCSR {0:#x} has reserved bits set")]
    Mxcsr(u32),
    /// There is no memory for the tiles that the image has.
    #[error(transparent)]
    TileData(#[from] TileDataError),
}

impl Cpu {
    /// Writes an image of `components` in the standard format to `image`, which is filled up with zeroes; what does
    /// not fit is left out. XSTATE_BV has the components that are not in their initial configuration.
    ///
    /// This is the true state, live tiles that IA32_XFD disables included. An image as XSAVE would make it in the guest is
    /// one without [`CpuState::xfd_disabled`](crate::state::CpuState::xfd_disabled) components.
    pub fn save_xstate(&self, components: u64, image: &mut [u8]) {
        image.fill(0);
        let state = &self.state;
        let mut used = 0;
        let legacy = area::legacy_image(state, state.mxcsr, true);
        if components & FPU != 0 && area::x87_in_use(state) {
            used |= FPU;
        }
        if components & SSE != 0
            && (area::rows_in_use(state, 0..REGISTERS, 0..16) || state.mxcsr != MXCSR_RESET)
        {
            used |= SSE;
        }
        if let Some(place) = image.get_mut(..legacy.len()) {
            place.copy_from_slice(&legacy);
        }
        for row in COMPONENTS.iter().filter(|row| components & (1 << row.bit) != 0) {
            let at = row.offset as usize;
            let Some(place) = image.get_mut(at..at + row.size as usize) else { continue };
            if area::in_use(state, row.bit, REGISTERS) {
                used |= 1 << row.bit;
                if row.bit == area::TILEDATA {
                    self.tile_data_image(place);
                } else {
                    area::save(state, row.bit, REGISTERS, place);
                }
            }
        }
        if let Some(place) = image.get_mut(HEADER..HEADER + 8) {
            place.copy_from_slice(&used.to_le_bytes());
        }
    }

    /// Loads an image in the standard format. `allowed`: the components that it may have. What it does not have gets
    /// its initial configuration, PKRU excepted. IA32_XFD does not matter: tiles in the image become live tiles, for which
    /// room is made.
    ///
    /// # Errors
    ///
    /// [`XstateError`], with nothing changed.
    pub fn load_xstate(&mut self, allowed: u64, image: &[u8]) -> Result<(), XstateError> {
        let (Some(legacy), Some(header)) = (image.get(..HEADER), image.get(HEADER..HEADER + 64)) else {
            return Err(XstateError::Header);
        };
        let (words, _) = header.as_chunks();
        let mut words = words.iter().map(|word| u64::from_le_bytes(*word));
        let present = words.next().unwrap_or(0);
        if present & !allowed != 0 {
            return Err(XstateError::Components(present & !allowed));
        }
        if words.any(|word| word != 0) || (size_standard(present) as usize) > image.len() {
            return Err(XstateError::Header);
        }
        let mxcsr = area::mxcsr(legacy);
        if present & (FPU | SSE | AVX) != 0 && mxcsr & !MXCSR_DEFINED != 0 {
            return Err(XstateError::Mxcsr(mxcsr));
        }
        if present & TILEDATA != 0 {
            self.reserve_tile_data()?;
        }
        let selectors = self.hostexec.x87_selectors;
        let bits = self.features.linear_bits();
        let state = &mut self.state;
        state.x87 = if present & FPU != 0 { area::x87(legacy, true, selectors, bits) } else { X87::INIT };
        state.mxcsr = if present & (SSE | AVX) != 0 { mxcsr } else { MXCSR_RESET };
        let zeroes = [0; LEGACY_AND_HEADER as usize];
        let registers = if present & SSE != 0 { &legacy[160..416] } else { &zeroes[..256] };
        area::load_rows(state, 0..REGISTERS, 0..16, registers);
        for row in COMPONENTS {
            let (at, length) = (row.offset as usize, row.size as usize);
            match image.get(at..at + length) {
                Some(from) if present & (1 << row.bit) != 0 && row.bit == area::TILEDATA => {
                    for (tile, bytes) in from.as_chunks().0.iter().enumerate() {
                        self.load_tile(tile, bytes);
                    }
                }
                Some(from) if present & (1 << row.bit) != 0 => {
                    area::load(&mut self.state, row.bit, REGISTERS, from);
                }
                _ if row.bit == area::PKRU => {}
                _ => area::load_initial(&mut self.state, row.bit, REGISTERS),
            }
        }
        self.refresh_mode();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::Features;
    use crate::state::Zmm;

    const ALL: u64 = 0x2e7;

    fn cpu() -> Cpu {
        Cpu::new(Features::default(), Arc::default())
    }

    #[test]
    fn images_come_back() {
        let mut from = cpu();
        for (i, zmm) in from.state.zmm.iter_mut().enumerate() {
            *zmm = Zmm([i as u8 + 1; 64]);
        }
        from.state.k = [1, 2, 3, 4, 5, 6, 7, 8];
        from.state.pkru = 0x5555_5554;
        from.state.mxcsr = 0x1fa0;
        from.state.x87.fcw = 0x27f;
        from.state.x87.st[3] = [9, 8, 7, 6, 5, 4, 3, 2, 1, 7, 0, 0, 0, 0, 0, 0];
        let mut image = [0xff; 4096];
        from.save_xstate(ALL, &mut image);
        assert_eq!(image[HEADER..HEADER + 8], ALL.to_le_bytes());
        assert!(image[2696..].iter().all(|&byte| byte == 0));
        let mut to = cpu();
        to.load_xstate(ALL, &image).unwrap();
        assert_eq!((&to.state.zmm, to.state.k), (&from.state.zmm, from.state.k));
        assert_eq!((to.state.pkru, to.state.mxcsr, to.state.x87.fcw), (0x5555_5554, 0x1fa0, 0x27f));
        assert_eq!(to.state.x87.st[3], from.state.x87.st[3]);
    }

    #[test]
    fn what_is_not_in_the_image_is_initial() {
        let mut cpu = cpu();
        cpu.state.zmm = [Zmm([7; 64]); 32];
        cpu.state.k = [7; 8];
        cpu.state.pkru = 7;
        cpu.load_xstate(ALL, &[0; 4096]).unwrap();
        assert_eq!((cpu.state.zmm, cpu.state.k), ([Zmm([0; 64]); 32], [0; 8]));
        assert_eq!((cpu.state.mxcsr, cpu.state.x87), (MXCSR_RESET, X87::INIT));
        assert_eq!(cpu.state.pkru, 7, "not restored unless the image has it");
    }

    #[test]
    fn bad_images() {
        let with = |at: usize, value: u64| {
            let mut image = [0u8; 4096];
            image[at..at + 8].copy_from_slice(&value.to_le_bytes());
            image
        };
        let mut bad_mxcsr = with(HEADER, SSE);
        bad_mxcsr[24..28].copy_from_slice(&0x1_0000u32.to_le_bytes());
        for (image, error) in [
            (&with(HEADER, 1 << 17)[..], XstateError::Components(1 << 17)),
            (&with(HEADER + 8, 1 << 63), XstateError::Header),
            (&with(HEADER + 56, 1), XstateError::Header),
            (&with(HEADER, AVX)[..800], XstateError::Header),
            (&[0; 100], XstateError::Header),
            (&bad_mxcsr, XstateError::Mxcsr(0x1_0000)),
        ] {
            assert_eq!(cpu().load_xstate(ALL, image), Err(error));
        }
    }
}
