//! Which engine executes guest code.
#![expect(unsafe_code, reason = "asks the C library for what the kernel supports")]

use std::sync::OnceLock;

/// How CPUs execute guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Instruction by instruction: complete, and the reference.
    Interpret,
    /// Blocks that have run so often are translated to host code. Where the process has handlers of SIGSEGV and SIGBUS that
    /// call [`crate::mmu::host::recover`], and has said so, loops are faster.
    Translate(u32),
    /// Everything is translated, and what it does is compared with what the interpreter does; the process ends at the first
    /// difference. For one vCPU, and slow.
    Check,
}

impl Engine {
    /// The environment variable that says which engine CPUs get: `translate`, which is the default, `interp`, `check`, or `translate:N` for
    /// [`Engine::Translate`] with another number than [`Engine::HOT`].
    pub const VARIABLE: &str = "RING3_ENGINE";
    /// How often a block usually runs before it is translated.
    pub const HOT: u32 = 16;

    /// The engine of this process. Asked for one that it cannot have, it says why, once, and interprets.
    pub fn configured() -> Engine {
        static CONFIGURED: OnceLock<Engine> = OnceLock::new();
        *CONFIGURED.get_or_init(|| {
            let wanted = std::env::var(Engine::VARIABLE).unwrap_or_default();
            let engine = Engine::parse(&wanted).unwrap_or_else(|| {
                let variable = Engine::VARIABLE;
                tracing::warn!(
                    "{variable}={wanted}: not interp, translate, translate:N or check; guest code is interpreted"
                );
                Engine::Interpret
            });
            if engine != Engine::Interpret && !has_fsgsbase() {
                tracing::warn!(
                    "the host's kernel does not let programs set the GS base: guest code is interpreted"
                );
                return Engine::Interpret;
            }
            engine
        })
    }

    /// The engine of this name.
    fn parse(name: &str) -> Option<Engine> {
        match name.split_once(':') {
            None if name == "interp" => Some(Engine::Interpret),
            None if name == "check" => Some(Engine::Check),
            None if matches!(name, "" | "translate") => Some(Engine::Translate(Engine::HOT)),
            Some(("translate", after)) => after.parse().ok().map(Engine::Translate),
            _ => None,
        }
    }
}

/// Whether programs may use WRGSBASE (HWCAP2_FSGSBASE of the kernel's arch/x86/include/uapi/asm/hwcap2.h).
pub(super) fn has_fsgsbase() -> bool {
    // SAFETY: asks for a number.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & 2 != 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_have_names() {
        for (name, engine) in [
            ("", Some(Engine::Translate(Engine::HOT))),
            ("interp", Some(Engine::Interpret)),
            ("translate", Some(Engine::Translate(Engine::HOT))),
            ("check", Some(Engine::Check)),
            ("translate:3", Some(Engine::Translate(3))),
            ("translate:", None),
            ("jit", None),
        ] {
            assert_eq!(Engine::parse(name), engine, "{name}");
        }
    }
}
