//! Which process something on a volume belongs to, and whether that process still lives.

use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

/// A process, as it is written down for others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub(crate) pid: u32,
    /// When it started, so that a later process of the same number is not taken for it.
    pub(crate) started: String,
    /// Where its number means something: this boot of the machine, in this container.
    pub(crate) host: String,
}

impl Owner {
    /// This process.
    ///
    /// # Errors
    /// Where `/proc` does not say when it started.
    pub fn this_process() -> io::Result<Self> {
        Self::process(std::process::id())
    }

    /// The process `pid` of this container.
    pub(crate) fn process(pid: u32) -> io::Result<Self> {
        let started =
            started(pid).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat cannot be read")))?;
        Ok(Self { pid, started, host: host()? })
    }

    /// Whether it lives; `None` where that cannot be told from here.
    pub fn lives(&self) -> Option<bool> {
        let here = host().is_ok_and(|here| here == self.host);
        here.then(|| started(self.pid).is_some_and(|started| started == self.started))
    }
}

/// When process `pid` started, in ticks since the boot; `None` where there is no such process.
fn started(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program, in parentheses, may hold anything; state and start are fields 3 and 22.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    (state != "Z" && state != "X").then(|| fields.nth(18).map(str::to_string))?
}

fn host() -> io::Result<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let container = fs::read_link("/proc/self/ns/pid")?;
    Ok(format!("{} {}", boot.trim(), container.display()))
}
