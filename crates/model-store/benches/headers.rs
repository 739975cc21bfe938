//! How long headers take to read.

fn main() {}
