//! A virtual machine of libkrun's, as its C interface makes one: `libkrun-client KERNEL FORMAT INITRAMFS CPUS SPLIT CMDLINE`.
//! FORMAT is libkrun's number of the kernel's format, SPLIT 1 for a split irqchip.
//! Nothing here knows that it does not talk to a kernel.

use std::ffi::CString;
use std::process::ExitCode;

/// Memory of the guest in MiB.
const MEMORY: u32 = 256;

fn done(what: &str, result: i32) -> Result<u32, String> {
    u32::try_from(result).map_err(|_| format!("{what}: error {}", -result))
}

fn start(arguments: &[String]) -> Result<(), String> {
    let [kernel, format, initramfs, cpus, split, cmdline] = arguments else {
        return Err("usage: libkrun-client KERNEL FORMAT INITRAMFS CPUS SPLIT CMDLINE".into());
    };
    let text = |text: &String| CString::new(text.as_str()).map_err(|error| error.to_string());
    let number = |text: &String| text.parse::<u8>().map_err(|error| format!("{text}: {error}"));
    let (kernel, initramfs, cmdline) = (text(kernel)?, text(initramfs)?, text(cmdline)?);
    let context = done("krun_create_ctx", krun::krun_create_ctx())?;
    done("krun_set_vm_config", krun::krun_set_vm_config(context, number(cpus)?, MEMORY))?;
    done("krun_split_irqchip", krun::krun_split_irqchip(context, number(split)? != 0))?;
    done("krun_disable_implicit_console", krun::krun_disable_implicit_console(context))?;
    done("krun_disable_implicit_vsock", krun::krun_disable_implicit_vsock(context))?;
    let format = number(format)?.into();
    // SAFETY: the strings end with zero bytes and live until the calls have returned; 0 and 1 are open descriptors.
    unsafe {
        let set = krun::krun_set_kernel(
            context,
            kernel.as_ptr(),
            format,
            initramfs.as_ptr(),
            cmdline.as_ptr(),
        );
        done("krun_set_kernel", set)?;
        done("krun_add_serial_console_default", krun::krun_add_serial_console_default(context, 0, 1))?;
    }
    done("krun_start_enter", krun::krun_start_enter(context)).map(|_| ())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match start(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("libkrun-client: {message}");
            ExitCode::FAILURE
        }
    }
}
