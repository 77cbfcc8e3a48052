//! The pair of 8259s, as KVM has it in `i8259.c`.
//!
//! The state is KVM's own structure, `kvm_pic_state`. Single mode and ICW1's level bit do not exist on a PC and are
//! ignored; levels are told by ELCR.
//!
//! Lock order: the lock is a leaf. It is released before listeners hear of an EOI, and before a vCPU is woken.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_pic_state;

use super::IrqSource;
use super::bus::{ApicBus, Delivery};
use crate::routing::{Chip, PIC_PINS, Routing};

/// The master's input to which the slave's output is wired.
const CASCADE: u8 = 2;
/// The input that a request which has gone is taken for.
const SPURIOUS: u8 = 7;
/// The inputs of master and slave that ELCR can make level-triggered.
const ELCR_MASKS: [u8; 2] = [0xf8, 0xde];

/// The pair of 8259s.
pub struct Pic {
    chips: Mutex<Chips>,
    output: AtomicBool,
    bus: Arc<ApicBus>,
    routing: Arc<Routing>,
}

struct Chips {
    /// Master and slave.
    chip: [kvm_pic_state; 2],
    /// For each pin the sources that drive it high.
    lines: [u64; PIC_PINS],
}

/// What a register access leaves to be done without the lock.
#[derive(Debug, Default)]
struct Aftermath {
    /// Pins whose interrupt has been ended.
    ended: u16,
    /// Pins that have been masked or unmasked.
    mask_changed: u16,
    /// The output has to be worked out anew.
    update: bool,
}

impl Aftermath {
    const NONE: Self = Self { ended: 0, mask_changed: 0, update: false };
    const UPDATE: Self = Self { update: true, ..Self::NONE };

    fn ended(index: usize, irq: u8) -> Self {
        Self { ended: 1 << (irq as usize + 8 * index), ..Self::UPDATE }
    }
}

impl Chips {
    fn new(lines: [u64; PIC_PINS]) -> Self {
        let chip = ELCR_MASKS.map(|elcr_mask| kvm_pic_state { elcr_mask, ..Default::default() });
        Self { chip, lines }
    }

    /// The request of chip `index` that comes before what it has in service. In special fully nested mode the slave's
    /// interrupt in service does not hold back another one of the slave.
    fn request(&self, index: usize) -> Option<u8> {
        let chip = &self.chip[index];
        let requested = distance(chip, chip.irr & !chip.imr)?;
        let mut in_service = chip.isr;
        if index == 0 && chip.special_fully_nested_mode != 0 {
            in_service &= !(1 << CASCADE);
        }
        let wins = distance(chip, in_service).is_none_or(|busy| requested < busy);
        wins.then(|| irq_at(chip, requested))
    }

    /// Passes the slave's request on to the master; true if the master requests.
    fn settle(&mut self) -> bool {
        if self.request(1).is_some() {
            set_input(&mut self.chip[0], CASCADE, true);
            set_input(&mut self.chip[0], CASCADE, false);
        }
        self.request(0).is_some()
    }

    /// Interrupt acknowledge of one chip: to the in-service register, or at once out of it with automatic EOI.
    fn acknowledge(&mut self, index: usize, irq: u8) -> u16 {
        let chip = &mut self.chip[index];
        let bit = 1 << irq;
        chip.isr |= bit;
        if chip.elcr & bit == 0 {
            chip.irr &= !bit;
        }
        if chip.auto_eoi == 0 {
            return 0;
        }
        if chip.rotate_on_auto_eoi != 0 {
            chip.priority_add = (irq + 1) & 7;
        }
        chip.isr &= !bit;
        1 << (usize::from(irq) + 8 * index)
    }

    fn write_command(&mut self, index: usize, value: u8, listened_to: bool) -> Aftermath {
        let chip = &mut self.chip[index];
        if value & 0x10 != 0 {
            return initialize(chip, index, value, listened_to);
        }
        if value & 0x08 != 0 {
            if value & 0x04 != 0 {
                chip.poll = 1;
            }
            if value & 0x02 != 0 {
                chip.read_reg_select = value & 1;
            }
            if value & 0x40 != 0 {
                chip.special_mask = value >> 5 & 1;
            }
            return Aftermath::NONE;
        }
        self.write_ocw2(index, value)
    }

    /// OCW2: ends of interrupts and rotation, by bits 7:5.
    fn write_ocw2(&mut self, index: usize, value: u8) -> Aftermath {
        let chip = &mut self.chip[index];
        let (command, level) = (value >> 5, value & 7);
        match command {
            0 | 4 => {
                chip.rotate_on_auto_eoi = command >> 2;
                Aftermath::NONE
            }
            1 | 5 => {
                let Some(highest) = distance(chip, chip.isr) else { return Aftermath::NONE };
                let irq = irq_at(chip, highest);
                if command == 5 {
                    chip.priority_add = (irq + 1) & 7;
                }
                chip.isr &= !(1 << irq);
                Aftermath::ended(index, irq)
            }
            3 | 7 => {
                if command == 7 {
                    chip.priority_add = (level + 1) & 7;
                }
                chip.isr &= !(1 << level);
                Aftermath::ended(index, level)
            }
            6 => {
                chip.priority_add = (level + 1) & 7;
                Aftermath::UPDATE
            }
            _ => Aftermath::NONE,
        }
    }

    /// The data port: the mask, or the next word of the initialisation.
    fn write_data(&mut self, index: usize, value: u8) -> Aftermath {
        let chip = &mut self.chip[index];
        match chip.init_state {
            0 => {
                let changed = u16::from(chip.imr ^ value) << (8 * index);
                chip.imr = value;
                return Aftermath { mask_changed: changed, ..Aftermath::UPDATE };
            }
            1 => {
                chip.irq_base = value & 0xf8;
                chip.init_state = 2;
            }
            2 => chip.init_state = if chip.init4 != 0 { 3 } else { 0 },
            3 => {
                chip.special_fully_nested_mode = value >> 4 & 1;
                chip.auto_eoi = value >> 1 & 1;
                chip.init_state = 0;
            }
            _ => {}
        }
        Aftermath::NONE
    }

    fn read(&mut self, index: usize, data_port: bool) -> (u8, Aftermath) {
        let chip = &mut self.chip[index];
        if chip.poll != 0 {
            chip.poll = 0;
            return self.poll(index);
        }
        let value = match (data_port, chip.read_reg_select) {
            (true, _) => chip.imr,
            (false, 0) => chip.irr,
            (false, _) => chip.isr,
        };
        (value, Aftermath::NONE)
    }

    /// The poll command: an acknowledge by reading.
    fn poll(&mut self, index: usize) -> (u8, Aftermath) {
        let Some(irq) = self.request(index) else { return (SPURIOUS, Aftermath::UPDATE) };
        if index == 1 {
            self.chip[0].isr &= !(1 << CASCADE);
            self.chip[0].irr &= !(1 << CASCADE);
        }
        let chip = &mut self.chip[index];
        chip.irr &= !(1 << irq);
        chip.isr &= !(1 << irq);
        let update = index == 1 || irq != CASCADE;
        (0x80 | irq, Aftermath { update, ..Aftermath::ended(index, irq) })
    }
}

/// ICW1. `listened_to`: a vCPU takes interrupts of the 8259, so edges that are lost count as ended.
fn initialize(chip: &mut kvm_pic_state, index: usize, icw1: u8, listened_to: bool) -> Aftermath {
    let lost = chip.irr & !chip.elcr;
    chip.init4 = icw1 & 1;
    chip.last_irr = 0;
    chip.irr &= chip.elcr;
    chip.imr = 0;
    chip.priority_add = 0;
    chip.special_mask = 0;
    chip.read_reg_select = 0;
    if chip.init4 == 0 {
        chip.special_fully_nested_mode = 0;
        chip.auto_eoi = 0;
    }
    chip.init_state = 1;
    if !listened_to {
        return Aftermath::NONE;
    }
    chip.isr &= !lost;
    Aftermath { ended: u16::from(lost) << (8 * index), ..Aftermath::NONE }
}

/// How far the foremost of `irqs` is from the input of the highest priority.
fn distance(chip: &kvm_pic_state, irqs: u8) -> Option<u8> {
    (irqs != 0).then(|| irqs.rotate_right(u32::from(chip.priority_add & 7)).trailing_zeros() as u8)
}

/// The input at a distance from that of the highest priority.
fn irq_at(chip: &kvm_pic_state, distance: u8) -> u8 {
    distance.wrapping_add(chip.priority_add) & 7
}

/// Drives one input of one chip; an edge or a level becomes a request.
fn set_input(chip: &mut kvm_pic_state, irq: u8, level: bool) -> Delivery {
    let bit = 1 << irq;
    let edge_triggered = chip.elcr & bit == 0;
    let mut delivery = Delivery::Delivered(1);
    if level {
        if !edge_triggered || chip.last_irr & bit == 0 {
            delivery = Delivery::of(u32::from(chip.irr & bit == 0));
            chip.irr |= bit;
        }
        chip.last_irr |= bit;
    } else {
        chip.last_irr &= !bit;
        if !edge_triggered {
            chip.irr &= !bit;
        }
    }
    if chip.imr & bit != 0 { Delivery::Ignored } else { delivery }
}

impl Pic {
    pub(crate) fn new(bus: Arc<ApicBus>, routing: Arc<Routing>) -> Self {
        let chips = Mutex::new(Chips::new([0; PIC_PINS]));
        Self { chips, output: AtomicBool::new(false), bus, routing }
    }

    /// Back to the state after power-on; the lines stay as they are driven.
    pub fn reset(&self) {
        let mut chips = self.lock();
        *chips = Chips::new(chips.lines);
        self.output.store(false, Ordering::SeqCst);
    }

    /// Drives a pin, 0 to 15, for `source`.
    pub fn set_irq(&self, pin: usize, source: IrqSource, level: bool) -> Delivery {
        let mut chips = self.lock();
        let Some(line) = chips.lines.get_mut(pin) else { return Delivery::Ignored };
        let level = source.drive(line, level);
        let delivery = set_input(&mut chips.chip[pin >> 3], pin as u8 & 7, level);
        self.update(chips);
        delivery
    }

    /// Whether the pair requests an interrupt. One load.
    pub fn pending(&self) -> bool {
        self.output.load(Ordering::SeqCst)
    }

    /// Interrupt acknowledge: gives the vector. A request that has gone is a spurious IRQ 7 or 15.
    pub fn acknowledge(&self) -> u8 {
        let mut chips = self.lock();
        let mut ended = 0;
        let vector = match chips.request(0) {
            Some(CASCADE) => {
                ended |= chips.acknowledge(0, CASCADE);
                let slave = chips.request(1);
                if let Some(irq) = slave {
                    ended |= chips.acknowledge(1, irq);
                }
                chips.chip[1].irq_base.wrapping_add(slave.unwrap_or(SPURIOUS))
            }
            Some(irq) => {
                ended |= chips.acknowledge(0, irq);
                chips.chip[0].irq_base.wrapping_add(irq)
            }
            None => chips.chip[0].irq_base.wrapping_add(SPURIOUS),
        };
        // What is still pending counts as a new request, which wakes a vCPU.
        self.output.store(false, Ordering::SeqCst);
        self.finish(chips, Aftermath { ended, ..Aftermath::UPDATE });
        vector
    }

    /// A port read; `None` if the port is not the 8259s'. Only bytes can be read.
    pub fn read(&self, port: u16, size: usize) -> Option<u32> {
        let index = chip_at(port)?;
        if size != 1 {
            return Some(0);
        }
        let mut chips = self.lock();
        if port >= 0x4d0 {
            return Some(u32::from(chips.chip[index].elcr));
        }
        let (value, aftermath) = chips.read(index, port & 1 != 0);
        self.finish(chips, aftermath);
        Some(u32::from(value))
    }

    /// A port write; false if the port is not the 8259s'. Only bytes can be written.
    pub fn write(&self, port: u16, value: u32, size: usize) -> bool {
        let Some(index) = chip_at(port) else { return false };
        if size != 1 {
            return true;
        }
        let value = value as u8;
        let listened_to = self.bus.with(|lapics| lapics.iter().any(|lapic| lapic.accepts_pic()));
        let mut chips = self.lock();
        let aftermath = match port {
            0x4d0 | 0x4d1 => {
                let chip = &mut chips.chip[index];
                chip.elcr = value & chip.elcr_mask;
                Aftermath::NONE
            }
            _ if port & 1 == 0 => chips.write_command(index, value, listened_to),
            _ => chips.write_data(index, value),
        };
        self.finish(chips, aftermath);
        true
    }

    /// The image of the master (0) or the slave (1).
    pub fn state(&self, index: usize) -> kvm_pic_state {
        self.lock().chip[index & 1]
    }

    /// Takes over an image of the master (0) or the slave (1).
    pub fn set_state(&self, index: usize, image: kvm_pic_state) {
        let mut chips = self.lock();
        chips.chip[index & 1] = image;
        self.update(chips);
    }

    /// Tells listeners with the lock released, then works out the output.
    fn finish(&self, chips: MutexGuard<'_, Chips>, aftermath: Aftermath) {
        let masks = [chips.chip[0].imr, chips.chip[1].imr];
        if aftermath.ended == 0 && aftermath.mask_changed == 0 {
            if aftermath.update {
                self.update(chips);
            }
            return;
        }
        drop(chips);
        let imr = u16::from_le_bytes(masks);
        for pin in 0..PIC_PINS {
            let chip = Chip::of_pic_pin(pin);
            if aftermath.ended >> pin & 1 != 0 {
                self.routing.acknowledged(chip, pin);
            }
            if aftermath.mask_changed >> pin & 1 != 0 {
                self.routing.mask_changed(chip, pin, imr >> pin & 1 != 0);
            }
        }
        if aftermath.update {
            self.update(self.lock());
        }
    }

    /// Works out the output, and wakes a vCPU if it has gone high.
    fn update(&self, mut chips: MutexGuard<'_, Chips>) {
        let request = chips.settle();
        let rising = request && !self.output.swap(request, Ordering::SeqCst);
        if !request {
            self.output.store(false, Ordering::SeqCst);
        }
        drop(chips);
        if rising {
            self.bus.wake_for_pic();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Chips> {
        self.chips.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The chip that a port belongs to.
fn chip_at(port: u16) -> Option<usize> {
    match port {
        0x20 | 0x21 | 0x4d0 => Some(0),
        0xa0 | 0xa1 | 0x4d1 => Some(1),
        _ => None,
    }
}
