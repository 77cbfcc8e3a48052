//! The linear addresses that a test case can touch. They are the same on the host and in the guest: the
//! generator points operands at them, the host maps them at these addresses, and the guest's page tables
//! translate them to scattered physical pages.

/// Bytes in a page.
pub const PAGE: u64 = 4096;

/// First byte of the code window: two pages, readable, writable and executable, then nothing.
pub const CODE: u64 = 0x1000_0000;
/// Bytes in the code window.
pub const CODE_SIZE: u64 = 2 * PAGE;

/// First byte of the data window.
pub const DATA: u64 = 0x2000_0000;

/// What may be done with a page of the data window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Not mapped.
    None,
    /// Readable.
    Read,
    /// Readable and writable.
    Write,
}

/// The pages of the data window, in order.
pub const DATA_PAGES: [Access; 10] = {
    use Access::{None, Read, Write};
    [None, Write, Write, Write, None, Read, None, Write, Read, None]
};

/// The large writable part: pages 1 to 3.
pub const WRITABLE: std::ops::Range<u64> = DATA + PAGE..DATA + 4 * PAGE;

/// Filler of the code window. `06` is PUSH ES, which 64-bit mode has not: #UD wherever execution arrives.
pub const FILLER: u8 = 0x06;

/// What may be done with the page at `address`.
pub fn access(address: u64) -> Access {
    if (CODE..CODE + CODE_SIZE).contains(&address) {
        return Access::Write;
    }
    let page = address.wrapping_sub(DATA) / PAGE;
    DATA_PAGES.get(page as usize).copied().unwrap_or(Access::None)
}

/// All mapped pages: those of the code window, then those of the data window.
pub fn mapped_pages() -> impl Iterator<Item = (u64, Access)> {
    let code = (0..CODE_SIZE / PAGE).map(|i| (CODE + i * PAGE, Access::Write));
    let data = (0u64..).zip(DATA_PAGES).map(|(i, access)| (DATA + i * PAGE, access));
    code.chain(data.filter(|(_, access)| *access != Access::None))
}

/// The initial contents of all mapped pages, in the order of [`mapped_pages`].
#[derive(Clone, Debug)]
pub struct Contents {
    pages: Vec<(u64, Box<[u8]>)>,
}

impl Contents {
    /// Filler in the code window, seeded random bytes in the data window.
    pub fn new(seed: u64) -> Contents {
        let mut rng = crate::rng::Rng::new(seed ^ 0x636f_6e74_656e_7473);
        let page = |(address, _): (u64, Access)| {
            let mut bytes = vec![FILLER; PAGE as usize].into_boxed_slice();
            if address >= DATA {
                rng.fill(&mut bytes);
            }
            (address, bytes)
        };
        Contents { pages: mapped_pages().map(page).collect() }
    }

    /// The pages with their addresses.
    pub fn pages(&self) -> &[(u64, Box<[u8]>)] {
        &self.pages
    }
}
