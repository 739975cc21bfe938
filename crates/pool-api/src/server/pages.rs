//! The pages for people, `/` and `/docs`: files that lie in the binary, and what a browser may do with them.

use axum::Router;
use axum::http::{HeaderName, header};
use axum::response::IntoResponse;
use axum::routing::get;

struct File {
    path: &'static str,
    kind: &'static str,
    content: Content,
}

enum Content {
    Text(&'static str),
    /// Sent as it is: every browser unpacks it.
    Gzip(&'static [u8]),
}

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

const fn text(path: &'static str, kind: &'static str, content: &'static str) -> File {
    File { path, kind, content: Content::Text(content) }
}

const fn gzip(path: &'static str, kind: &'static str, content: &'static [u8]) -> File {
    File { path, kind, content: Content::Gzip(content) }
}

static FILES: [File; 7] = [
    text("/", HTML, include_str!("../../assets/dashboard.html")),
    text("/dashboard.css", CSS, include_str!("../../assets/dashboard.css")),
    text("/dashboard.js", SCRIPT, include_str!("../../assets/dashboard.js")),
    text("/docs", HTML, include_str!("../../assets/docs.html")),
    text("/docs/docs.js", SCRIPT, include_str!("../../assets/docs.js")),
    gzip("/docs/swagger-ui.css", CSS, include_bytes!("../../assets/swagger-ui/swagger-ui.css.gz")),
    gzip("/docs/swagger-ui-bundle.js", SCRIPT, include_bytes!("../../assets/swagger-ui/swagger-ui-bundle.js.gz")),
];

/// Nothing but these files and this API: text of an engine's log that looks like a script is none.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HEADERS: [(HeaderName, &str); 4] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-cache"),
];

/// Whether a path is of a page. It holds nothing of this node.
pub(super) fn has(path: &str) -> bool {
    FILES.iter().any(|file| file.path == path)
}

pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES.iter().fold(Router::new(), |router, file| {
        let send = move || async move {
            let kind = [(header::CONTENT_TYPE, file.kind)];
            match file.content {
                Content::Text(text) => (kind, HEADERS, text).into_response(),
                Content::Gzip(bytes) => (kind, HEADERS, [(header::CONTENT_ENCODING, "gzip")], bytes).into_response(),
            }
        };
        router.route(file.path, get(send))
    })
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    /// What others wrote is what they published: changed by a new version and its line in the README alone.
    #[test]
    fn the_viewer_is_the_one_that_the_readme_names() {
        let readme = include_str!("../../assets/swagger-ui/README.md");
        for file in &FILES {
            let Content::Gzip(bytes) = file.content else { continue };
            let digest: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
            let name = file.path.rsplit('/').next().unwrap_or_default();
            assert!(readme.contains(&format!("{digest}  {name}.gz")), "{name} is {digest}");
        }
    }
}
