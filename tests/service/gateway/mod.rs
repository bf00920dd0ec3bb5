//! The gateway's front: routes, keys, limits, bad input. Its jobs are in a real store; the tests themselves are
//! the workers, by way of the store, where what a worker does is not the matter.

mod access;
mod bodies;
mod clients;
mod connections;
mod corpus;
mod document;
mod jobs;
mod mutations;
mod process;
mod rig;
