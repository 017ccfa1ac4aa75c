//! What a program file says about the libraries it needs (System V ABI, ELF,
//! 64-bit little-endian).

const HEADER_BYTES: usize = 64;
const MAGIC: &[u8] = b"\x7fELF\x02\x01";
const LOADED: u32 = 1;
const DYNAMIC: u32 = 2;
const INTERPRETER: u32 = 3;
const TAG_NEEDED: u64 = 1;
const TAG_STRINGS: u64 = 5;

/// The file is not an ELF file that we can read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// Not 64-bit little-endian ELF.
    #[error("it is not a 64-bit little-endian ELF file")]
    Kind,
    /// A table points outside the file.
    #[error("its {0} lie outside the file")]
    CutShort(&'static str),
}

/// What a program needs to start; both are empty for a static one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// Path of the program that loads the libraries.
    pub interpreter: Option<String>,
    /// Names of libraries.
    pub libraries: Vec<String>,
}

struct Segment {
    kind: u32,
    offset: usize,
    address: u64,
    size: usize,
}

/// Reads what the program in `file` needs.
pub fn needs(file: &[u8]) -> Result<Needs, ElfError> {
    if file.len() < HEADER_BYTES || !file.starts_with(MAGIC) {
        return Err(ElfError::Kind);
    }
    let segments = segments(file).ok_or(ElfError::CutShort("program headers"))?;
    let find = |kind| segments.iter().find(|segment| segment.kind == kind);
    let interpreter = find(INTERPRETER)
        .map(|segment| text(file, segment.offset).ok_or(ElfError::CutShort("interpreter's name")))
        .transpose()?;
    let libraries = find(DYNAMIC)
        .map(|dynamic| {
            libraries(file, dynamic, &segments).ok_or(ElfError::CutShort("dynamic entries"))
        })
        .transpose()?
        .unwrap_or_default();
    Ok(Needs {
        interpreter,
        libraries,
    })
}

fn segments(file: &[u8]) -> Option<Vec<Segment>> {
    let start = size(file, 32)?;
    let entry = usize::from(u16::from_le_bytes(bytes(file, 54)?));
    let count = usize::from(u16::from_le_bytes(bytes(file, 56)?));
    (0..count)
        .map(|index| {
            let at = start.checked_add(index.checked_mul(entry)?)?;
            Some(Segment {
                kind: u32::from_le_bytes(bytes(file, at)?),
                offset: size(file, at.checked_add(8)?)?,
                address: u64::from_le_bytes(bytes(file, at.checked_add(16)?)?),
                size: size(file, at.checked_add(32)?)?,
            })
        })
        .collect()
}

fn libraries(file: &[u8], dynamic: &Segment, segments: &[Segment]) -> Option<Vec<String>> {
    const ENTRY: usize = 16;
    let end = dynamic.offset.checked_add(dynamic.size)?;
    let entries: Vec<(u64, u64)> = file
        .get(dynamic.offset..end)?
        .chunks_exact(ENTRY)
        .map(|entry| {
            Some((
                u64::from_le_bytes(bytes(entry, 0)?),
                u64::from_le_bytes(bytes(entry, 8)?),
            ))
        })
        .collect::<Option<_>>()?;
    let needed: Vec<u64> = entries
        .iter()
        .filter(|(tag, _)| *tag == TAG_NEEDED)
        .map(|(_, value)| *value)
        .collect();
    if needed.is_empty() {
        return Some(Vec::new());
    }
    let (_, address) = entries.iter().find(|(tag, _)| *tag == TAG_STRINGS)?;
    // The table is given by its address in memory; the segment that is loaded there
    // says where that is in the file.
    let strings = segments.iter().find_map(|segment| {
        let within = usize::try_from(address.checked_sub(segment.address)?).ok()?;
        (segment.kind == LOADED && within < segment.size)
            .then(|| segment.offset.checked_add(within))?
    })?;
    needed
        .into_iter()
        .map(|offset| text(file, strings.checked_add(usize::try_from(offset).ok()?)?))
        .collect()
}

fn bytes<const N: usize>(file: &[u8], at: usize) -> Option<[u8; N]> {
    file.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn size(file: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u64::from_le_bytes(bytes(file, at)?)).ok()
}

/// The zero-terminated text at `at`.
fn text(file: &[u8], at: usize) -> Option<String> {
    let rest = file.get(at..)?;
    let end = rest.iter().position(|byte| *byte == 0)?;
    Some(String::from_utf8_lossy(&rest[..end]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_program() -> Vec<u8> {
        std::fs::read(std::env::current_exe().unwrap()).unwrap()
    }

    #[test]
    fn own_program_needs_the_c_library_and_a_loader() {
        let needs = needs(&own_program()).unwrap();
        assert!(needs.libraries.iter().any(|name| name == "libc.so.6"));
        assert!(needs.interpreter.unwrap().contains("ld-linux"));
    }

    #[test]
    fn other_files_are_refused() {
        assert_eq!(needs(b"#!/bin/sh\n"), Err(ElfError::Kind));
        assert_eq!(needs(&[]), Err(ElfError::Kind));
    }

    #[test]
    fn files_cut_short_are_errors_and_never_panics() {
        let program = own_program();
        let mut errors = 0;
        for length in (0..4096).chain([program.len() / 2]) {
            errors += usize::from(needs(&program[..length.min(program.len())]).is_err());
        }
        assert!(errors > 64, "{errors}");
    }

    #[test]
    fn wild_offsets_are_errors() {
        let mut program = own_program();
        program[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(needs(&program), Err(ElfError::CutShort("program headers")));
    }
}
