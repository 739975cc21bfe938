//! Model references and web addresses: whatever is read is written so that it is read the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pool_domain::ModelRef;
use pool_domain::model_policy::Allowed;
use pool_domain::model_ref::HttpUrl;

fuzz_target!(|text: &str| {
    if let Ok(model) = text.parse::<ModelRef>() {
        assert_eq!(model.to_string().parse(), Ok(model));
    }
    if let Ok(url) = HttpUrl::parse(text) {
        assert_eq!(HttpUrl::parse(&url.revealed()), Ok(url.clone()));
        let _ = url.join(text);
    }
    if let Ok(allowed) = text.parse::<Allowed>() {
        assert_eq!(allowed.to_string().parse(), Ok(allowed));
    }
});
