//! The ublk target against which reads are measured: it answers every request at once, with whatever its buffer holds. What
//! a device costs beyond it is the device's own. libublk's own loop, one queue of 128 requests, as our devices have.
//!
//! Prints the path of its device. Killed, it leaves a dead device behind; `delete` of the driver takes that away.

use std::io::Write as _;
use std::process::ExitCode;
use std::rc::Rc;

use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::{BufDescList, UblkDev, UblkIOCtx, UblkQueue};
use libublk::{BufDesc, UblkFlags, UblkIORes, sys};

/// As our devices.
const QUEUE_DEPTH: u16 = 128;
const REQUEST_LEN_BYTES: u32 = 512 * 1024;

fn main() -> ExitCode {
    let Some(size_bytes) = std::env::args().nth(1).and_then(|size| size.parse::<u64>().ok()) else {
        eprintln!("usage: null-target BYTES");
        return ExitCode::from(2);
    };
    match run(size_bytes) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("null-target: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(size_bytes: u64) -> Result<(), libublk::UblkError> {
    let control = UblkCtrlBuilder::default()
        .name("null")
        .nr_queues(1)
        .depth(QUEUE_DEPTH)
        .io_buf_bytes(REQUEST_LEN_BYTES)
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()?;
    let target = move |device: &mut UblkDev| {
        device.set_default_params(size_bytes);
        device.tgt.params.basic.attrs = sys::UBLK_ATTR_READ_ONLY;
        device.tgt.params.basic.logical_bs_shift = 12;
        device.tgt.params.basic.physical_bs_shift = 12;
        device.tgt.params.basic.io_min_shift = 12;
        device.tgt.params.basic.io_opt_shift = 16;
        Ok(())
    };
    let ready = |control: &UblkCtrl| {
        println!("{}", control.get_bdev_path());
        let _ = std::io::stdout().flush();
    };
    control.run_target(target, serve, ready).map(drop)
}

fn serve(queue: u16, device: &UblkDev) {
    let buffers = Rc::new(device.alloc_queue_io_bufs());
    let queue = UblkQueue::new(queue, device)
        .and_then(|queue| queue.submit_fetch_commands_unified(BufDescList::Slices(Some(&buffers))));
    match queue {
        Ok(queue) => {
            queue.wait_and_handle_io(|queue, tag, _: &UblkIOCtx<'_>| {
                answer(queue, tag, &buffers[usize::from(tag)]);
            });
        }
        Err(error) => eprintln!("null-target: {error}"),
    }
}

fn answer(queue: &UblkQueue<'_>, tag: u16, buffer: &[u8]) {
    let len_bytes = queue.get_iod(tag).nr_sectors << 9;
    let result = UblkIORes::Result(i32::try_from(len_bytes).unwrap_or(-5));
    if let Err(error) = queue.complete_io_cmd_unified(tag, BufDesc::Slice(buffer), Ok(result)) {
        eprintln!("null-target: {error}");
    }
}
