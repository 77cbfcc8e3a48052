//! The MC146818 real-time clock and its CMOS memory at ports 0x70 and 0x71.
//!
//! Time runs from the host's clock, in BCD and 24-hour form as firmware sets it up; the guest may choose binary
//! and may set the time, which moves an offset. Alarm, periodic and update interrupts are not wired.

use super::bus::Device;
use crate::layout;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// Status B: the clock stands still while it is set.
const B_SET: u8 = 1 << 7;
/// Status B: binary instead of BCD.
const B_BINARY: u8 = 1 << 2;
/// Status B: 24-hour instead of 12-hour form.
const B_24_HOUR: u8 = 1 << 1;
/// Status D: memory and time are valid.
const D_VALID: u8 = 1 << 7;
/// Hours in 12-hour form: afternoon.
const PM: u8 = 1 << 7;

/// Seconds since 1970-01-01 00:00:00 UTC.
pub type Clock = Box<dyn Fn() -> i64 + Send>;

/// The device.
pub struct Cmos {
    clock: Clock,
    /// What the guest's clock is ahead of the host's, in seconds.
    offset: i64,
    /// The instant shown while [`B_SET`] holds the clock.
    frozen: Option<i64>,
    index: u8,
    memory: [u8; 128],
}

/// A calendar date and time of day, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Date {
    year: i64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Date {
    /// The proleptic Gregorian date of an instant. Years are counted from March, so that the leap day is the
    /// last day of its year and 400 years are one period of 146,097 days.
    fn from_seconds(seconds: i64) -> Date {
        let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let days = days + 719_468; // since 0000-03-01
        let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        Date {
            year: era * 400 + year_of_era + i64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }

    /// The instant of a date. Fields out of range carry over.
    fn seconds(&self) -> i64 {
        let year = self.year - i64::from(self.month <= 2);
        let march_month = (i64::from(self.month) + 9) % 12;
        let day_of_year = (153 * march_month + 2) / 5 + i64::from(self.day) - 1;
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        let time = i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second);
        days * 86_400 + time
    }
}

impl Cmos {
    /// A clock for a machine with `low` bytes of RAM below 4 GiB and `high` bytes above.
    pub fn new(clock: Clock, low: u64, high: u64) -> Self {
        let mut memory = [0; 128];
        memory[usize::from(STATUS_A)] = 0x26; // 32.768 kHz time base, 1024 Hz periodic rate
        memory[usize::from(STATUS_B)] = B_24_HOUR;
        memory[usize::from(STATUS_D)] = D_VALID;
        let mut put = |at: usize, value: u64, bytes: usize| {
            let value = value.min((1 << (8 * bytes)) - 1).to_le_bytes();
            memory[at..at + bytes].copy_from_slice(&value[..bytes]);
        };
        let above_1m = low.saturating_sub(1 << 20);
        put(0x15, layout::EBDA_END / 1024, 2); // conventional memory, KiB
        put(0x17, above_1m / 1024, 2); // above 1 MiB, KiB
        put(0x30, above_1m / 1024, 2);
        put(0x34, low.saturating_sub(16 << 20) >> 16, 2); // above 16 MiB, 64 KiB
        put(0x5b, high >> 16, 3); // above 4 GiB, 64 KiB
        Self { clock, offset: 0, frozen: None, index: 0, memory }
    }

    fn status_b(&self) -> u8 {
        self.memory[usize::from(STATUS_B)]
    }

    /// The guest's time, within bounds in which calendar arithmetic cannot overflow.
    fn now(&self) -> i64 {
        let now = self.frozen.unwrap_or_else(|| (self.clock)().saturating_add(self.offset));
        now.clamp(-(1 << 40), 1 << 40)
    }

    fn encode(&self, value: u8) -> u8 {
        if self.status_b() & B_BINARY != 0 { value } else { ((value / 10 % 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.status_b() & B_BINARY != 0 {
            value
        } else {
            (value >> 4).wrapping_mul(10).wrapping_add(value & 15)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.status_b() & B_24_HOUR != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { PM } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.status_b() & B_24_HOUR != 0 {
            return self.decode(value);
        }
        self.decode(value & !PM) % 12 + if value & PM != 0 { 12 } else { 0 }
    }

    fn read_register(&mut self, index: u8) -> u8 {
        let date = Date::from_seconds(self.now());
        match index {
            SECONDS => self.encode(date.second),
            MINUTES => self.encode(date.minute),
            HOURS => self.encode_hour(date.hour),
            // 1970-01-01 was a Thursday; Sunday is day 1.
            WEEKDAY => self.encode((self.now().div_euclid(86_400) + 4).rem_euclid(7) as u8 + 1),
            DAY => self.encode(date.day),
            MONTH => self.encode(date.month),
            YEAR => self.encode(date.year.rem_euclid(100) as u8),
            CENTURY => self.encode(date.year.div_euclid(100).rem_euclid(100) as u8),
            STATUS_C => 0,
            _ => self.memory[usize::from(index & 0x7f)],
        }
    }

    fn write_register(&mut self, index: u8, value: u8) {
        let mut date = Date::from_seconds(self.now());
        let number = self.decode(value);
        let century = date.year.div_euclid(100) * 100;
        match index {
            SECONDS => date.second = number,
            MINUTES => date.minute = number,
            HOURS => date.hour = self.decode_hour(value),
            DAY => date.day = number,
            MONTH => date.month = number.clamp(1, 12),
            YEAR => date.year = century + i64::from(number % 100),
            CENTURY => date.year = i64::from(number % 100) * 100 + date.year.rem_euclid(100),
            STATUS_B => return self.write_status_b(value),
            STATUS_A => {
                // The update-in-progress bit is the clock's own.
                self.memory[usize::from(STATUS_A)] = value & 0x7f;
                return;
            }
            WEEKDAY | STATUS_C | STATUS_D => return,
            _ => {
                self.memory[usize::from(index & 0x7f)] = value;
                return;
            }
        }
        self.set_time(date.seconds());
    }

    fn write_status_b(&mut self, value: u8) {
        let (before, now) = (self.status_b(), self.now());
        self.memory[usize::from(STATUS_B)] = value;
        if before & B_SET == 0 && value & B_SET != 0 {
            self.frozen = Some(now);
        } else if value & B_SET == 0 && self.frozen.take().is_some() {
            self.set_time(now);
        }
    }

    fn set_time(&mut self, seconds: i64) {
        match &mut self.frozen {
            Some(frozen) => *frozen = seconds,
            None => self.offset = seconds.saturating_sub((self.clock)()),
        }
    }
}

impl Device for Cmos {
    fn read(&mut self, offset: u64, _size: u8) -> u64 {
        // The index port cannot be read back.
        if offset == 0 { 0xff } else { self.read_register(self.index).into() }
    }

    fn write(&mut self, offset: u64, _size: u8, value: u64) {
        if offset == 0 {
            // Bit 7 masks NMIs on real machines; it is no part of the index.
            self.index = value as u8 & 0x7f;
        } else {
            self.write_register(self.index, value as u8);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI64, Ordering};

    /// 2026-11-21 13:25:59 UTC, a Saturday.
    const NOW: i64 = 1_795_267_559;

    fn get(cmos: &mut Cmos, index: u8) -> u8 {
        cmos.write(0, 1, index.into());
        cmos.read(1, 1) as u8
    }

    fn set(cmos: &mut Cmos, index: u8, value: u8) {
        cmos.write(0, 1, index.into());
        cmos.write(1, 1, value.into());
    }

    fn all(cmos: &mut Cmos) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, WEEKDAY].map(|index| get(cmos, index))
    }

    #[test]
    fn dates_are_right_over_four_centuries() {
        for (seconds, date) in [
            (0, (1970, 1, 1)),
            (951_782_400, (2000, 2, 29)),
            (-1, (1969, 12, 31)),
            (4_107_542_400, (2100, 3, 1)),
            (NOW, (2026, 11, 21)),
        ] {
            let found = Date::from_seconds(seconds);
            assert_eq!((found.year, found.month, found.day), date, "{seconds}");
            assert_eq!(found.seconds(), seconds);
        }
        for days in (-200_000..200_000).step_by(37) {
            assert_eq!(Date::from_seconds(days * 86_400).seconds(), days * 86_400);
        }
    }

    #[test]
    fn time_is_told_in_every_form() {
        let mut cmos = Cmos::new(Box::new(|| NOW), 1 << 30, 0);
        assert_eq!(all(&mut cmos), [0x20, 0x26, 0x11, 0x21, 0x13, 0x25, 0x59, 7]);
        set(&mut cmos, STATUS_B, B_24_HOUR | B_BINARY);
        assert_eq!(all(&mut cmos), [20, 26, 11, 21, 13, 25, 59, 7]);
        set(&mut cmos, STATUS_B, 0);
        assert_eq!(get(&mut cmos, HOURS), 0x81);
        assert_eq!((get(&mut cmos, STATUS_A), get(&mut cmos, STATUS_D)), (0x26, 0x80));
    }

    #[test]
    fn the_guest_may_set_the_time() {
        let host = Arc::new(AtomicI64::new(NOW));
        let clock = host.clone();
        let mut cmos = Cmos::new(Box::new(move || clock.load(Ordering::Relaxed)), 1 << 30, 0);
        set(&mut cmos, STATUS_B, B_24_HOUR | B_SET);
        for (index, value) in [(CENTURY, 0x19), (YEAR, 0x99), (MONTH, 0x12), (DAY, 0x31)] {
            set(&mut cmos, index, value);
        }
        for (index, value) in [(HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x58)] {
            set(&mut cmos, index, value);
        }
        host.fetch_add(100, Ordering::Relaxed);
        assert_eq!(all(&mut cmos), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58, 6]);
        set(&mut cmos, STATUS_B, B_24_HOUR);
        host.fetch_add(2, Ordering::Relaxed);
        assert_eq!(all(&mut cmos), [0x20, 0, 1, 1, 0, 0, 0, 7]);
    }

    #[test]
    fn any_bytes_are_taken() {
        let mut cmos = Cmos::new(Box::new(|| i64::MAX), 1 << 30, 0);
        for index in 0..=255 {
            for value in [0, 0x7f, 0x80, 0xff] {
                set(&mut cmos, index, value);
                get(&mut cmos, index);
            }
        }
    }

    #[test]
    fn memory_sizes_are_told() {
        let mut cmos = Cmos::new(Box::new(|| NOW), 3 << 30, 1 << 30);
        let mut pair = |index| u16::from(get(&mut cmos, index)) | u16::from(get(&mut cmos, index + 1)) << 8;
        assert_eq!((pair(0x15), pair(0x17), pair(0x34), pair(0x5b)), (640, 0xffff, 0xbf00, 0x4000));
    }
}
