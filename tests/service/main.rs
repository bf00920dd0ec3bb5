//! The service from outside: the real binary as a child process, with fakes of the world around it. Nothing
//! here needs a network; servers listen on a free loopback port.

mod generate;
mod inputs;
mod interrupt;
mod media;
mod memory;
mod support;
