//! The exit codes: what the README promises, and what the command line says in its help.

/// Code and meaning.
pub(crate) type ExitCodes = Vec<(u8, String)>;

/// The rows of the README's table.
pub(crate) fn of_readme(markdown: &str) -> ExitCodes {
    let rows = markdown.lines().skip_while(|line| *line != "| code | meaning |").skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    rows.filter_map(|row| {
        let (code, meaning) = row.trim_matches('|').split_once('|')?;
        Some((code.trim().parse().ok()?, meaning.trim().to_owned()))
    })
    .collect()
}

/// The lines of the constant that is printed after the help.
pub(crate) fn of_help(source: &str) -> ExitCodes {
    let text = source.split_once("EXIT_CODES: &str = \"").and_then(|(_, rest)| rest.split_once('"'));
    let lines = text.map(|(text, _)| text.lines()).into_iter().flatten();
    lines
        .filter_map(|line| {
            let (code, meaning) = line.trim().split_once(' ')?;
            Some((code.parse().ok()?, meaning.trim().to_owned()))
        })
        .collect()
}

#[test]
fn both_forms_are_read() {
    let expected = [(0, "done".to_owned()), (1, "bad `luck`".to_owned())];
    assert_eq!(of_readme("x\n| code | meaning |\n|---|---|\n| 0 | done |\n| 1 | bad `luck` |\n\n"), expected);
    assert_eq!(of_help("const EXIT_CODES: &str = \"Exit codes:\n  0   done\n  1   bad `luck`\";"), expected);
}
