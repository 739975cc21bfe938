//! The users of this machine, from its files. Those of other directories (LDAP, NIS) are named by numbers.

use std::fs;
use std::path::PathBuf;

use engine_shim::User;
use pool_domain::isolation::{RunAs, UserName};

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// A user that an engine can run as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Account {
    /// Its numbers.
    pub(crate) user: User,
    /// Its name, or its number where it has none.
    pub(crate) name: String,
    /// Its home, where it is known.
    pub(crate) home: Option<PathBuf>,
}

/// Finds the user that is meant; `None` if this machine does not know it.
pub(crate) fn find(run_as: &RunAs) -> Option<Account> {
    let read = |path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    find_in(run_as, &read(PASSWD), &read(GROUP))
}

/// In passwd(5) and group(5).
fn find_in(run_as: &RunAs, passwd: &str, group: &str) -> Option<Account> {
    let entry = passwd.lines().find_map(|line| {
        let entry = Entry::read(line)?;
        let meant = match run_as {
            RunAs::User(UserName::Name(name)) => entry.name == name,
            RunAs::User(UserName::Uid(uid)) | RunAs::Ids { uid, .. } => entry.uid == *uid,
        };
        meant.then_some(entry)
    });
    let home = entry.as_ref().map(|entry| PathBuf::from(entry.home)).filter(|home| home.is_absolute());
    match (run_as, entry) {
        (RunAs::Ids { uid, gid }, entry) => {
            let name = entry.map_or_else(|| uid.to_string(), |entry| entry.name.to_owned());
            Some(Account { user: User { uid: *uid, gid: *gid, groups: Vec::new() }, name, home })
        }
        (RunAs::User(_), Some(Entry { name, uid, gid, .. })) => {
            let mut groups: Vec<u32> = group.lines().filter_map(|line| group_of(line, name)).collect();
            groups.retain(|further| *further != gid);
            groups.sort_unstable();
            groups.dedup();
            Some(Account { user: User { uid, gid, groups }, name: name.to_owned(), home })
        }
        (RunAs::User(_), None) => None,
    }
}

/// A line of passwd(5).
struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Entry<'a> {
    fn read(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(Self { name, uid, gid, home: fields.nth(1)? })
    }
}

/// The number of the group, if a line of group(5) names the user as a member.
fn group_of(line: &str, member: &str) -> Option<u32> {
    let mut fields = line.split(':').skip(2);
    let gid = fields.next()?.parse().ok()?;
    fields.next()?.split(',').any(|name| name.trim() == member).then_some(gid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/bash\nbroken\n+nis::::::\nllm:x:990:990::/var/lib/llm:/usr/sbin/nologin\n";
    const GROUP: &str = "root:x:0:\nvideo:x:44:llm,other\nllm:x:990:llm\nrender:x:105:other, llm\n";

    fn account(text: &str) -> Option<Account> {
        find_in(&text.parse().unwrap(), PASSWD, GROUP)
    }

    #[test]
    fn a_user_has_its_groups_and_two_numbers_have_one() {
        let user = |gid, groups: &[u32]| User { uid: 990, gid, groups: groups.to_vec() };
        let llm = |user| Some(Account { user, name: "llm".into(), home: Some("/var/lib/llm".into()) });
        assert_eq!(account("llm"), llm(user(990, &[44, 105])));
        assert_eq!(account("990"), llm(user(990, &[44, 105])));
        assert_eq!(account("990:7"), llm(user(7, &[])));
        let user = User { uid: 5000, gid: 5000, groups: Vec::new() };
        assert_eq!(account("5000:5000"), Some(Account { user, name: "5000".into(), home: None }));
        assert_eq!((account("nobody"), account("5000")), (None, None));
    }
}
