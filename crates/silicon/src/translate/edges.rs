//! How blocks go on: to others of the region, by links to those outside, by addresses, and back from calls.

use std::mem::offset_of;

use iced_x86::code_asm::{CodeLabel, dword_ptr, qword_ptr, r14d, r15d, rsp};
use iced_x86::{Code, Instruction, MemoryOperand, Register};

use super::emit::{Cold, Emitter, Result, Target, instructions};
use super::flags::{Flags, Rax, Wanted};
use super::link::{self, Link};
use super::registers::{ADDRESS, VALUE, field, slot};
use super::{Failure, routines};
use crate::cpu::{Cpu, Requests};
use crate::mmu::host;
use crate::mmu::tlb::PAGE_MASK;
use crate::state::reg;

impl Emitter<'_> {
    /// Instructions executed but not counted at the end of the block.
    fn due(&self) -> i32 {
        self.owed + self.length()
    }

    /// Ends the block: goes on at `target`, relative to the start of its page. `taken` takes the branch back, if it is one.
    pub(super) fn go_to(&mut self, target: i64, taken: u64) -> Result<()> {
        let due = self.due();
        match self.targets.get(&target).copied() {
            Some(to) => self.go_on_within(&to, target, due, taken),
            None => self.go_out(due, target, taken),
        }
    }

    /// Ends the block: goes on at `target` if the condition in RFLAGS, `jump`, holds, and at `next` if not, where `jump_not` is the
    /// opposite.
    pub(super) fn go_either_way(
        &mut self,
        [jump, jump_not]: [Jump; 2],
        target: i64,
        next: i64,
        taken: u64,
    ) -> Result<()> {
        let due = self.due();
        for way in [target, next] {
            // Both ways may want the same.
            if let Some(Wanted::Marked(recipe)) = self.targets.get(&way).and_then(|to| to.start.flags)
                && self.flags.recipe == Some(recipe)
            {
                self.mark_flags(recipe)?;
            }
        }
        match self.targets.get(&target).copied() {
            Some(to) if self.is_free(&to, target, due) => jump(self, to.label)?,
            Some(to) => {
                let past = self.a.create_label();
                jump_not(self, past)?;
                let flags = self.flags;
                self.go_within(&to, target, due, taken)?;
                self.a.jmp(to.label)?;
                self.flags = flags;
                self.place(past)?;
            }
            None => {
                let at = self.a.create_label();
                jump(self, at)?;
                self.cold.push(Cold::Exit { at, flags: self.flags, owed: due, target, taken });
            }
        }
        self.go_to(next, 0)
    }

    /// Whether nothing is to be done on the way.
    fn is_free(&self, to: &Target, target: i64, due: i32) -> bool {
        let flags = match to.start.flags {
            Some(Wanted::Host) => self.flags.host,
            Some(Wanted::Saved) => self.flags.rax == Rax::Flags,
            Some(Wanted::Marked(recipe)) => match self.flags.rax {
                Rax::Nothing => false,
                Rax::Flags => true,
                Rax::Marked => self.flags.recipe == Some(recipe),
            },
            None => true,
        };
        flags && due == to.start.owed && (to.start.is_loop || !self.is_backwards(target))
    }

    /// Every loop within a region goes backwards somewhere.
    fn is_backwards(&self, target: i64) -> bool {
        target <= i64::from(self.ops[0].page_offset)
    }

    /// Ends the block: goes on in the region, with `due` instructions to be counted so far.
    fn go_on_within(&mut self, to: &Target, target: i64, due: i32, taken: u64) -> Result<()> {
        self.go_within(to, target, due, taken)?;
        if self.follower != Some(target) {
            self.a.jmp(to.label)?;
        }
        Ok(())
    }

    /// Does what has to be done before a jump within the region, with `due` instructions to be counted so far.
    fn go_within(&mut self, to: &Target, target: i64, due: i32, taken: u64) -> Result<()> {
        let owed = due - to.start.owed;
        let keeps_flags = to.start.flags == Some(Wanted::Host);
        let polls = self.is_backwards(target) && !to.start.is_loop;
        // The count tells that it is time to look for requests, where it may change the flags.
        let can_be_had = self.flags.rax != Rax::Nothing || self.flags.recipe.is_some();
        let by_count = polls && owed > 0 && !keeps_flags && (to.start.flags.is_some() || can_be_had);
        if polls && !by_count {
            self.poll(target, due, taken)?;
        }
        match to.start.flags {
            Some(Wanted::Host) => self.load_flags()?,
            Some(Wanted::Saved) => self.save_flags()?,
            Some(Wanted::Marked(recipe)) => self.mark_flags(recipe)?,
            None => {}
        }
        if by_count {
            return self.count_and_poll(to, target, owed);
        }
        if owed != 0 && !keeps_flags {
            self.a.add(instructions(), owed)?;
        } else if owed != 0 {
            // In a way that keeps the flags.
            self.a.mov(ADDRESS, instructions())?;
            self.a.lea(ADDRESS, qword_ptr(ADDRESS + owed))?;
            self.a.mov(instructions(), ADDRESS)?;
        }
        Ok(())
    }

    /// Counts instructions before going on at `target` in the region, and leaves if it is time to look for requests and there are some.
    fn count_and_poll(&mut self, to: &Target, target: i64, owed: i32) -> Result<()> {
        let link = Link::make(self.arena, target, 0).ok_or(Failure::Full)?;
        let (at, back) = (self.a.create_label(), self.a.create_label());
        self.flags.host = false;
        self.a.add(instructions(), owed)?;
        self.a.jns(at)?;
        self.place(back)?;
        self.cold.push(Cold::Rest { at, back, flags: self.flags, counted: -to.start.owed, link });
        Ok(())
    }

    /// Leaves before going on at `target` if somebody wants something: by a load that faults then, which keeps the flags, or by a
    /// comparison where nobody recovers from faults.
    fn poll(&mut self, target: i64, due: i32, taken: u64) -> Result<()> {
        let link = Link::make(self.arena, target, taken).ok_or(Failure::Full)?;
        let at = self.a.create_label();
        let recovers = host::recovers();
        if !recovers {
            self.free_host_flags()?;
        }
        self.cold.push(Cold::Polled { at, flags: self.flags, owed: due, link });
        self.a.mov(ADDRESS, field(offset_of!(Cpu, translator.requests)))?;
        if !recovers {
            self.a.cmp(dword_ptr(ADDRESS), 0)?;
            return Ok(self.a.jne(at)?);
        }
        self.a.mov(ADDRESS, qword_ptr(ADDRESS + offset_of!(Requests, poll)))?;
        self.may_fault_to(at);
        Ok(self.a.mov(r15d, dword_ptr(ADDRESS))?)
    }

    /// Counts instructions before the region is left, if there are any, and leaves it as `way` says if it is time to look for requests
    /// and there are some. The flags are in RAX.
    fn count(&mut self, due: i32, way: Way) -> Result<()> {
        if due != 0 {
            let (at, back) = (self.a.create_label(), self.a.create_label());
            self.a.add(instructions(), due)?;
            self.a.jns(at)?;
            self.place(back)?;
            self.cold.push(Cold::Stop { at, back, way });
        }
        Ok(())
    }

    /// The block at hand is a loop by itself: counts its instructions before its `body`. If nobody wants anything where it looks for
    /// requests, it goes on at `rested`.
    pub(super) fn begin_loop(&mut self, body: CodeLabel, rested: CodeLabel) -> Result<()> {
        let target = i64::from(self.ops[0].page_offset);
        let link = Link::make(self.arena, target, 0).ok_or(Failure::Full)?;
        let at = self.a.create_label();
        self.a.add(instructions(), self.due())?;
        self.a.jns(at)?;
        self.place(body)?;
        self.owed = -self.length();
        self.cold.push(Cold::Rest { at, back: rested, flags: self.flags, counted: self.length(), link });
        Ok(())
    }

    /// Behind the region: it is time to look for requests.
    pub(super) fn stop(&mut self, back: CodeLabel, way: Way) -> Result<()> {
        let (renew, no_jump, leave) =
            (self.routines.renew_wholly, self.routines.no_jump, self.routines.leave);
        self.a.call(renew)?;
        self.a.je(back)?;
        match way {
            Way::Link(link) => {
                self.a.mov(ADDRESS, link | super::LEAVE_LINK)?;
                Ok(self.a.jmp(leave)?)
            }
            Way::Kept(taken) => {
                self.a.mov(ADDRESS, field(offset_of!(Cpu, translator.kept)))?;
                self.a.mov(VALUE, taken)?;
                Ok(self.a.jmp(no_jump)?)
            }
            Way::Address(taken) => {
                self.a.mov(VALUE, taken)?;
                Ok(self.a.jmp(no_jump)?)
            }
        }
    }

    /// Likewise, where a loop begins anew whose block has been counted already.
    pub(super) fn rest(&mut self, back: CodeLabel, flags: Flags, counted: i32, link: u64) -> Result<()> {
        let (renew, leave) = (self.routines.renew, self.routines.leave);
        self.a.call(renew)?;
        self.a.je(back)?;
        self.flags = flags;
        self.settle_flags()?;
        if counted != 0 {
            self.a.sub(instructions(), counted)?;
        }
        self.a.mov(ADDRESS, link | super::LEAVE_LINK)?;
        Ok(self.a.jmp(leave)?)
    }

    /// Goes on outside the region, with `due` instructions to be counted.
    pub(super) fn go_out(&mut self, due: i32, target: i64, taken: u64) -> Result<()> {
        self.settle_flags()?;
        let link = Link::make(self.arena, target, taken).ok_or(Failure::Full)?;
        self.count(due, Way::Link(link))?;
        let code = self.linked(link, target)?;
        self.put(Instruction::with1(Code::Jmp_rm64, code)?)
    }

    /// Where the address of the code at `target` is, by its link: leaves if it is not known. The flags are in RAX.
    fn linked(&mut self, link: u64, target: i64) -> Result<MemoryOperand> {
        let at = self.a.create_label();
        self.cold.push(Cold::Unlinked { at, link });
        let validity = match Link::stays_in_page(target) {
            true => offset_of!(Cpu, translator.validity_within),
            false => offset_of!(Cpu, translator.validity),
        };
        self.a.mov(ADDRESS, field(validity))?;
        let valid = rip_relative(link + Link::VALIDITY);
        self.put(Instruction::with2(Code::Cmp_r64_rm64, Register::from(ADDRESS), valid)?)?;
        self.a.jne(at)?;
        let pages = target & !(PAGE_MASK as i64);
        if pages != 0 {
            let pages = i32::try_from(pages).map_err(|_| Failure::Unsuited)?;
            self.a.add(slot(reg::IP_BASE), pages)?;
        }
        Ok(rip_relative(link + Link::CODE))
    }

    /// Ends the block: goes on at the address in [`ADDRESS`]. `taken` takes the branch back.
    pub(super) fn go_to_address(&mut self, taken: u64) -> Result<()> {
        self.settle_flags()?;
        self.count(self.due(), Way::Address(taken))?;
        self.find_jump(taken)?;
        Ok(self.a.jmp(qword_ptr(VALUE + offset_of!(link::Jump, code)))?)
    }

    /// Has [`VALUE`] point to the [`Jump`](link::Jump) for the address in [`ADDRESS`], or leaves. Each branch does that by itself, for
    /// the host predicts the jump by where it is. The flags are in RAX.
    fn find_jump(&mut self, taken: u64) -> Result<()> {
        let (unknown, invalid) = (self.a.create_label(), self.a.create_label());
        routines::find_jump(&mut self.a, (VALUE, r14d), unknown, invalid)?;
        self.cold.push(Cold::NoJump { at: unknown, overwritten: false, taken });
        self.cold.push(Cold::NoJump { at: invalid, overwritten: true, taken });
        Ok(())
    }

    /// Ends the block with a call of `target`, which returns to `next`. [`ADDRESS`] is the return address.
    pub(super) fn call(&mut self, target: i64, next: i64, taken: u64) -> Result<()> {
        self.settle_flags()?;
        let link = Link::make(self.arena, target, taken).ok_or(Failure::Full)?;
        self.count(self.due(), Way::Link(link))?;
        self.keep_return()?;
        let code = self.linked(link, target)?;
        self.put(Instruction::with1(Code::Call_rm64, code)?)?;
        self.land(next)
    }

    /// Ends the block with a call of the address in `kept`, likewise.
    pub(super) fn call_address(&mut self, next: i64, taken: u64) -> Result<()> {
        self.settle_flags()?;
        self.count(self.due(), Way::Kept(taken))?;
        self.keep_return()?;
        self.a.mov(ADDRESS, field(offset_of!(Cpu, translator.kept)))?;
        self.find_jump(taken)?;
        self.a.call(qword_ptr(VALUE + offset_of!(link::Jump, code)))?;
        self.land(next)
    }

    /// Keeps the return address in [`ADDRESS`] on the host's stack, where [`Emitter::return_to_address`] looks for it above the
    /// host's own.
    fn keep_return(&mut self) -> Result<()> {
        let (at, back) = (self.a.create_label(), self.a.create_label());
        self.a.cmp(rsp, field(offset_of!(Cpu, translator.stack_limit)))?;
        self.a.jb(at)?;
        self.place(back)?;
        self.cold.push(Cold::Deep { at, back });
        Ok(self.a.push(ADDRESS)?)
    }

    /// Behind a call: [`ADDRESS`] is the return address again, and the flags are in RAX.
    fn land(&mut self, next: i64) -> Result<()> {
        self.a.lea(rsp, qword_ptr(rsp + 8))?;
        self.a.lea(ADDRESS, qword_ptr(ADDRESS - next as i32))?;
        self.a.mov(slot(reg::IP_BASE), ADDRESS)?;
        self.flags = Flags::SAVED;
        match self.targets.get(&next).copied() {
            Some(to) => self.go_on_within(&to, next, 0, 0),
            None => self.go_out(0, next, 0),
        }
    }

    /// Ends the block with a return to the address in [`ADDRESS`].
    pub(super) fn return_to_address(&mut self, taken: u64) -> Result<()> {
        self.settle_flags()?;
        self.count(self.due(), Way::Address(taken))?;
        let at = self.a.create_label();
        self.a.cmp(ADDRESS, qword_ptr(rsp + 8))?;
        self.a.jne(at)?;
        self.cold.push(Cold::ReturnMissed { at, taken });
        Ok(self.a.ret()?)
    }
}

/// How a region is left if there are requests.
#[derive(Clone, Copy)]
pub(super) enum Way {
    /// For the target of this link.
    Link(u64),
    /// For the address in [`ADDRESS`]; this takes the branch back.
    Address(u64),
    /// For the address in `kept`, likewise.
    Kept(u64),
}

/// Emits a jump to a label.
pub(super) type Jump = fn(&mut Emitter<'_>, CodeLabel) -> Result<()>;

/// The memory at `address`, which the code reaches.
pub(super) fn rip_relative(address: u64) -> MemoryOperand {
    MemoryOperand::with_base_displ(Register::RIP, address as i64)
}
