//! What this build is.

/// Version, commit and its date as `cargo xtask dist` gives them; a build by hand has the version alone. No clock is read for
/// it, so that the same commit gives the same bytes.
pub const VERSION: &str = match option_env!("POOL_MANAGERD_BUILD") {
    Some(told) => told,
    None => env!("CARGO_PKG_VERSION"),
};

#[cfg(test)]
mod tests {
    use super::VERSION;

    #[test]
    fn the_version_comes_first() {
        assert_eq!(VERSION.split(' ').next(), Some(env!("CARGO_PKG_VERSION")));
    }
}
