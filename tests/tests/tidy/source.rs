//! Rust source as far as the rules need it: comments and literals blanked out, functions found by their braces.

/// The source with comments, strings and characters replaced by spaces; lines stay where they are.
pub(crate) fn code_only(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while !rest.is_empty() {
        let hidden = comment_len(rest).or_else(|| string_len(rest, code.chars().last())).or_else(|| char_len(rest));
        let Some(len) = hidden else {
            let first = rest.chars().next().unwrap();
            code.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        };
        code.extend(rest[..len].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        rest = &rest[len..];
    }
    code
}

fn comment_len(rest: &str) -> Option<usize> {
    if rest.starts_with("//") {
        return Some(rest.find('\n').unwrap_or(rest.len()));
    }
    let mut depth = 0;
    let mut at = 0;
    while rest.starts_with("/*") {
        match &rest[at..] {
            inner if inner.starts_with("/*") => (depth, at) = (depth + 1, at + 2),
            inner if inner.starts_with("*/") => (depth, at) = (depth - 1, at + 2),
            inner => at += inner.chars().next().map_or(1, char::len_utf8),
        }
        if depth == 0 || at >= rest.len() {
            return Some(at.min(rest.len()));
        }
    }
    None
}

/// A string of any kind, its prefix included.
fn string_len(rest: &str, before: Option<char>) -> Option<usize> {
    let in_word = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let body = if in_word { rest } else { rest.trim_start_matches(['b', 'c']) };
    if let Some(raw) = body.strip_prefix('r').filter(|_| !in_word) {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if let Some(text) = raw[hashes..].strip_prefix('"') {
            let end = format!("\"{}", "#".repeat(hashes));
            let len = text.find(&end).map_or(text.len(), |at| at + end.len());
            return Some(rest.len() - text.len() + len);
        }
    }
    let text = body.strip_prefix('"')?;
    let mut escaped = false;
    let end = text.find(|c| {
        let is_end = c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        is_end
    });
    Some(rest.len() - text.len() + end.map_or(text.len(), |at| at + 1))
}

/// A character, but not a lifetime.
fn char_len(rest: &str) -> Option<usize> {
    let text = rest.strip_prefix('\'')?;
    if let Some(escape) = text.strip_prefix('\\') {
        let skip = escape.chars().next()?.len_utf8();
        return Some(2 + skip + escape[skip..].find('\'')? + 1);
    }
    let first = text.chars().next()?;
    text[first.len_utf8()..].starts_with('\'').then(|| 1 + first.len_utf8() + 1)
}

/// A function with a body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) first_line: usize,
    pub(crate) lines: usize,
}

/// The functions in source that [`code_only`] made; those inside others too.
pub(crate) fn functions(code: &str) -> Vec<Function> {
    let mut functions = Vec::new();
    for (at, _) in word_positions(code, "fn") {
        let rest = code[at + 2..].trim_start();
        let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        // No name: a type `fn(..)`. A `;` outside brackets before the first brace: no body.
        let Some(open) = body_start(&code[at..]).filter(|_| !name.is_empty()) else { continue };
        let mut depth = 0usize;
        let close = code[at + open..].find(|c| {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => (),
            }
            depth == 0
        });
        let end = at + open + close.unwrap_or(0);
        let lines = code[at..=end].lines().count();
        functions.push(Function { name, first_line: code[..at].matches('\n').count() + 1, lines });
    }
    functions
}

fn body_start(signature: &str) -> Option<usize> {
    let mut brackets = 0i32;
    for (at, c) in signature.char_indices() {
        match c {
            '(' | '[' => brackets += 1,
            ')' | ']' => brackets -= 1,
            ';' if brackets == 0 => return None,
            '{' if brackets == 0 => return Some(at),
            _ => (),
        }
    }
    None
}

/// Where `word` stands alone: offset and line.
fn word_positions<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = (usize, usize)> + 'a {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word).filter_map(move |(at, _)| {
        let alone = !text[..at].ends_with(is_word) && !text[at + word.len()..].starts_with(is_word);
        alone.then(|| (at, text[..at].matches('\n').count() + 1))
    })
}

/// The numbers of the lines that hold `word`.
pub(crate) fn lines_with_word(text: &str, word: &str) -> Vec<usize> {
    word_positions(text, word).map(|(_, line)| line).collect()
}

/// The numbers of the lines that hold `part`.
pub(crate) fn lines_with(text: &str, part: &str) -> Vec<usize> {
    (1..).zip(text.lines()).filter(|(_, line)| line.contains(part)).map(|(number, _)| number).collect()
}

#[test]
fn literals_and_comments_are_not_code() {
    let source = "a(\"fn \\\" {\", '{', b'\\'', r#\"un\"safe\"#, 'x: 'static) /* fn { /* } */ */ b // unsafe\nc";
    let code = code_only(source);
    assert_eq!(code.split_whitespace().collect::<String>(), "a(,,b,,'x:'static)bc");
    assert_eq!(code.len(), source.len());
    assert_eq!(lines_with_word("unsafe_code\nan unsafe one", "unsafe"), [2]);
}

#[test]
fn functions_are_found_by_their_braces() {
    let code = "trait T { fn none(&self) -> [u8; 4]; }\nfn outer(f: fn(u8)) -> [u8; 2] {\n  fn inner() {}\n  {}\n}\n";
    let found: Vec<_> = functions(code).into_iter().map(|f| (f.name, f.first_line, f.lines)).collect();
    assert_eq!(found, [("outer".to_owned(), 2, 4), ("inner".to_owned(), 3, 1)]);
}
