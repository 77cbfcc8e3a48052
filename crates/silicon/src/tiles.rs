//! AMX's state: the tile configuration (TILECFG, 64 bytes of every CPU) and the tiles (TILEDATA, 8 KiB that a CPU
//! has only once somebody has reserved them). (SDM vol. 1, chapter 18.)

use std::collections::TryReserveError;

use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::model::xstate;
use crate::vmx::Exit;

/// Tiles of palette 1 (CPUID.(1DH,1):EBX\[31:16\]).
pub const TILES: usize = 8;
/// Rows of a tile (CPUID.(1DH,1):ECX\[15:0\]).
pub const ROWS: usize = 16;
/// Bytes of a row (CPUID.(1DH,1):EBX\[15:0\]).
pub const ROW_BYTES: usize = 64;
/// Bytes of a tile.
pub const TILE_BYTES: usize = ROWS * ROW_BYTES;
/// Highest palette (CPUID.(1DH,0):EAX).
pub const MAX_PALETTE: u8 = 1;
/// Bytes of TILECFG in memory.
pub const CONFIG_BYTES: usize = 64;
/// What the matrix unit can multiply: rows of the second source, bytes of its rows (CPUID.(1EH,0):EBX).
pub const TMUL_MAX: (usize, usize) = (16, 64);

/// Where things are in TILECFG's image (SDM vol. 2A, LDTILECFG, table 3-10); every other byte is zero.
mod at {
    pub(super) const PALETTE: usize = 0;
    pub(super) const START_ROW: usize = 1;
    /// 16 bits each.
    pub(super) const BYTES_PER_ROW: usize = 16;
    pub(super) const ROWS: usize = 48;
}

/// TILECFG. All zero is its initial configuration: no tiles are configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TileConfig {
    /// Palette: 0 or 1.
    pub palette: u8,
    /// Row at which an interrupted TILELOADD or TILESTORED goes on.
    pub start_row: u8,
    /// Bytes per row of each tile, 0 to 64.
    pub bytes_per_row: [u8; TILES],
    /// Rows of each tile, 0 to 16; 0 exactly where the bytes per row are 0.
    pub rows: [u8; TILES],
}

impl TileConfig {
    /// The configuration that LDTILECFG makes of its operand; `None`: #GP.
    pub fn from_image(image: &[u8; CONFIG_BYTES]) -> Option<TileConfig> {
        let palette = image[at::PALETTE];
        if palette == 0 {
            return Some(TileConfig::default());
        }
        let mut config = TileConfig { palette, start_row: image[at::START_ROW], ..TileConfig::default() };
        for tile in 0..TILES {
            let bytes = image[at::BYTES_PER_ROW + 2 * tile];
            let rows = image[at::ROWS + tile];
            if usize::from(bytes) > ROW_BYTES || usize::from(rows) > ROWS || (bytes == 0) != (rows == 0) {
                return None;
            }
            config.bytes_per_row[tile] = bytes;
            config.rows[tile] = rows;
        }
        // What does not come back is in a reserved byte, or in the upper half of a row's length.
        (palette <= MAX_PALETTE && config.image() == *image).then_some(config)
    }

    /// The 64 bytes that STTILECFG stores.
    pub fn image(&self) -> [u8; CONFIG_BYTES] {
        let mut image = [0; CONFIG_BYTES];
        if self.configured() {
            image[at::PALETTE] = self.palette;
            image[at::START_ROW] = self.start_row;
            for tile in 0..TILES {
                image[at::BYTES_PER_ROW + 2 * tile] = self.bytes_per_row[tile];
                image[at::ROWS + tile] = self.rows[tile];
            }
        }
        image
    }

    /// TILES_CONFIGURED.
    pub fn configured(&self) -> bool {
        self.palette != 0
    }

    /// Rows, and bytes per row, of a tile that exists and whose rows are whole doublewords: what an instruction other
    /// than TILEZERO can use.
    pub(crate) fn usable(&self, tile: u8) -> Option<(usize, usize)> {
        let (rows, bytes) = self.valid(tile)?;
        bytes.is_multiple_of(4).then_some((rows, bytes))
    }

    /// Rows, and bytes per row, of a tile that exists.
    pub(crate) fn valid(&self, tile: u8) -> Option<(usize, usize)> {
        let tile = usize::from(tile);
        let (rows, bytes) = (*self.rows.get(tile)?, *self.bytes_per_row.get(tile)?);
        (self.configured() && rows != 0).then_some((usize::from(rows), usize::from(bytes)))
    }
}

/// One row of a tile, as doublewords.
pub(crate) type Row = [u32; ROW_BYTES / 4];

/// One tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub(crate) struct Tile(pub(crate) [Row; ROWS]);

impl Tile {
    pub(crate) const ZERO: Tile = Tile([[0; ROW_BYTES / 4]; ROWS]);

    /// The bytes of row `row`.
    pub(crate) fn row_bytes(&self, row: usize) -> [u8; ROW_BYTES] {
        let mut bytes = [0; ROW_BYTES];
        for (slot, word) in bytes.as_chunks_mut().0.iter_mut().zip(self.0[row]) {
            *slot = word.to_le_bytes();
        }
        bytes
    }

    /// Replaces row `row`.
    pub(crate) fn set_row_bytes(&mut self, row: usize, bytes: &[u8; ROW_BYTES]) {
        for (word, bytes) in self.0[row].iter_mut().zip(bytes.as_chunks().0) {
            *word = u32::from_le_bytes(*bytes);
        }
    }

    /// Zeroes what lies beyond `rows` rows of `bytes` bytes.
    pub(crate) fn crop(&mut self, rows: usize, bytes: usize) {
        self.0[rows..].fill([0; ROW_BYTES / 4]);
        for row in &mut self.0[..rows] {
            row[bytes / 4..].fill(0);
        }
    }

    /// The bytes of all rows.
    pub(crate) fn to_bytes(self) -> [u8; TILE_BYTES] {
        let mut bytes = [0; TILE_BYTES];
        for (row, slot) in bytes.as_chunks_mut::<ROW_BYTES>().0.iter_mut().enumerate() {
            *slot = self.row_bytes(row);
        }
        bytes
    }

    fn from_bytes(bytes: &[u8; TILE_BYTES]) -> Tile {
        let mut tile = Tile::ZERO;
        for (row, bytes) in bytes.as_chunks().0.iter().enumerate() {
            tile.set_row_bytes(row, bytes);
        }
        tile
    }
}

/// There is no memory for the tiles of a CPU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no memory for the tiles of a CPU: {0}")]
pub struct TileDataError(#[from] TryReserveError);

/// Where a CPU keeps its tiles. They mean something only while [`CpuState::tile_data_used`] is set; otherwise TILEDATA is
/// in its initial configuration, and all tiles are zero whatever is stored here.
///
/// [`CpuState::tile_data_used`]: crate::state::CpuState::tile_data_used
#[derive(Debug, Default)]
pub(crate) struct TileData {
    tiles: Option<Box<[Tile; TILES]>>,
    /// There is no memory for them, for tests.
    #[cfg(any(test, feature = "testing"))]
    refused: bool,
}

impl TileData {
    fn reserve(&mut self) -> Result<(), TileDataError> {
        if self.tiles.is_none() {
            let mut tiles = Vec::new();
            tiles.try_reserve_exact(self.wanted())?;
            tiles.resize(TILES, Tile::ZERO);
            self.tiles = Box::try_from(tiles).ok();
        }
        Ok(())
    }

    #[cfg(any(test, feature = "testing"))]
    fn wanted(&self) -> usize {
        if self.refused { usize::MAX } else { TILES }
    }

    #[cfg(not(any(test, feature = "testing")))]
    fn wanted(&self) -> usize {
        TILES
    }
}

/// Reserving and moving TILEDATA: for who runs the CPU.
impl Cpu {
    /// Makes room for this CPU's tiles, as the hypervisor does when the guest is about to use them: XCR0\[18\] set and
    /// XFD\[18\] clear, or on [`Exit::StateNeeded`]. Nothing the guest can see changes.
    ///
    /// # Errors
    ///
    /// [`TileDataError`] if there is no memory; the CPU is as it was and can go on without tiles.
    pub fn reserve_tile_data(&mut self) -> Result<(), TileDataError> {
        self.tiles.reserve()
    }

    /// Frees the room again. TILEDATA gets its initial configuration.
    pub fn release_tile_data(&mut self) {
        self.tiles = TileData::default();
        self.state.tile_data_used = false;
    }

    /// Makes [`Cpu::reserve_tile_data`] fail from now on, or not, for tests of what comes of it.
    #[cfg(any(test, feature = "testing"))]
    pub fn refuse_tile_data(&mut self, refused: bool) {
        self.tiles.refused = refused;
    }

    /// Bytes of memory that this CPU's tiles take.
    pub fn tile_data_bytes(&self) -> usize {
        self.tiles.tiles.as_ref().map_or(0, |tiles| size_of_val(&**tiles))
    }

    /// TILEDATA as an XSAVE area holds it, whatever XFD says. What does not fit is left out.
    pub(crate) fn tile_data_image(&self, image: &mut [u8]) {
        image.fill(0);
        let Some(tiles) = self.tiles.tiles.as_ref().filter(|_| self.state.tile_data_used) else { return };
        for (slot, tile) in image.as_chunks_mut::<TILE_BYTES>().0.iter_mut().zip(tiles.iter()) {
            *slot = tile.to_bytes();
        }
    }

    /// Loads one tile of TILEDATA from an XSAVE area; all eight must follow each other. The room has been reserved.
    pub(crate) fn load_tile(&mut self, tile: usize, bytes: &[u8; TILE_BYTES]) {
        if let Some(slot) = self.tiles.tiles.as_mut().and_then(|tiles| tiles.get_mut(tile)) {
            *slot = Tile::from_bytes(bytes);
            self.state.tile_data_used |= tile == TILES - 1;
        }
    }
}

/// TILEDATA for the instructions that use it.
impl Cpu {
    /// #NM if IA32_XFD disables any of `components`, which the instruction would use (SDM vol. 1, 13.14).
    pub(crate) fn check_xfd(&mut self, components: u64) -> Result<(), Abort> {
        let state = &mut self.state;
        if state.xfd_disabled() & components == 0 {
            return Ok(());
        }
        state.xfd_err = state.xfd & components;
        self.counters.xfd_faults += 1;
        Err(self.raise(Exception::NM))
    }

    /// Leaves guest mode if there is no room for the tiles yet.
    pub(crate) fn need_tile_data(&mut self) -> Result<(), Abort> {
        if self.tiles.tiles.is_some() {
            return Ok(());
        }
        Err(self.exit(Exit::StateNeeded { components: xstate::TILEDATA }))
    }

    /// The tiles, to be changed: from now on TILEDATA is in use. `None` where there is no room for them; see
    /// [`Cpu::need_tile_data`].
    pub(crate) fn tiles_mut(&mut self) -> Option<&mut [Tile; TILES]> {
        let tiles = self.tiles.tiles.as_deref_mut()?;
        if !self.state.tile_data_used {
            *tiles = [Tile::ZERO; TILES];
            self.state.tile_data_used = true;
        }
        Some(tiles)
    }

    /// One tile; `None` if all of them are zero.
    pub(crate) fn tile(&self, tile: u8) -> Option<&Tile> {
        self.tiles.tiles.as_ref().filter(|_| self.state.tile_data_used)?.get(usize::from(tile))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::Features;

    /// Palette 1, start row 3, tile 0 of 16 rows of 64 bytes, tile 7 of 2 rows of 6 bytes.
    fn image() -> [u8; CONFIG_BYTES] {
        let mut image = [0; CONFIG_BYTES];
        (image[0], image[1]) = (1, 3);
        (image[16], image[48], image[30], image[55]) = (64, 16, 6, 2);
        image
    }

    #[test]
    fn configurations_come_back() {
        let config = TileConfig::from_image(&image()).unwrap();
        assert_eq!(config.image(), image());
        assert_eq!((config.usable(0), config.valid(7)), (Some((16, 64)), Some((2, 6))));
        assert_eq!((config.usable(7), config.valid(1), config.valid(8)), (None, None, None));
        let mut junk = [0xff; CONFIG_BYTES];
        junk[0] = 0;
        assert_eq!(
            TileConfig::from_image(&junk),
            Some(TileConfig::default()),
            "palette 0: nothing else counts"
        );
        assert_eq!(TileConfig::default().image(), [0; CONFIG_BYTES]);
    }

    #[test]
    fn every_reserved_byte_and_every_bad_shape_is_refused() {
        let refused = |at: usize, value: u8| {
            let mut image = image();
            image[at] = value;
            assert_eq!(TileConfig::from_image(&image), None, "byte {at} = {value}");
        };
        refused(0, 2);
        refused(0, 255);
        (2..16).chain(32..48).chain(56..64).for_each(|at| refused(at, 1));
        (0..8).for_each(|tile| refused(17 + 2 * tile, 1));
        refused(16, 65);
        refused(48, 17);
        refused(16, 0);
        refused(48, 0);
        refused(18, 4);
        refused(49, 1);
    }

    #[test]
    fn a_cpu_has_no_tiles_until_they_are_reserved() {
        let mut cpu = Cpu::new(Features::default(), Arc::default());
        assert_eq!(cpu.tile_data_bytes(), 0);
        assert!(cpu.tiles_mut().is_none() && cpu.tile(0).is_none());
        cpu.reserve_tile_data().unwrap();
        assert_eq!((cpu.tile_data_bytes(), cpu.state.tile_data_used), (8192, false));
        cpu.tiles_mut().unwrap()[2].0[1][3] = 0x4433_2211;
        let mut image = [0xff; TILES * TILE_BYTES];
        cpu.tile_data_image(&mut image);
        assert_eq!(image[2 * 1024 + 64 + 12..][..4], [0x11, 0x22, 0x33, 0x44]);
        assert_eq!(image.iter().filter(|&&byte| byte != 0).count(), 4);
        // Initial configuration: what is stored does not count.
        cpu.state.tile_data_used = false;
        cpu.tile_data_image(&mut image);
        assert!(image == [0; TILES * TILE_BYTES] && cpu.tile(2).is_none());
        assert_eq!(cpu.tiles_mut().unwrap()[2], Tile::ZERO);
        cpu.release_tile_data();
        assert_eq!((cpu.tile_data_bytes(), cpu.state.tile_data_used), (0, false));
    }
}
