//! The service from outside: the real binary as a child process, with fakes of the world around it. Nothing
//! here needs a network; servers listen on a free loopback port.

mod clients;
mod crash;
mod deploy;
mod gateway;
mod generate;
mod gpu_check;
mod hub;
mod inputs;
mod interrupt;
mod lambda;
mod matrix;
mod media;
mod memory;
mod planning;
mod pool;
mod prepare;
mod rp;
mod runner;
mod secrets;
mod storage;
mod store;
mod support;
mod worker;
