//! The byte alphabet of byte-level BPE: every byte has a printable character
//! that stands for it in the vocabulary (GPT-2, `bytes_to_unicode`).

/// The character that stands for `byte`.
pub(super) fn char_of_byte(byte: u8) -> char {
    match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        // The other 68 bytes are numbered from 256 upwards, in order.
        0..=0x20 => shifted(u32::from(byte)),
        0x7F..=0xA0 => shifted(u32::from(byte) - 0x7F + 33),
        0xAD => shifted(67),
    }
}

fn shifted(index: u32) -> char {
    char::from_u32(256 + index).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The characters of all bytes, in order.
pub(crate) fn byte_characters() -> impl Iterator<Item = char> {
    (0..=u8::MAX).map(char_of_byte)
}

/// The byte that `character` stands for, `None` outside the alphabet.
pub(super) fn byte_of_char(character: char) -> Option<u8> {
    let code = u32::from(character);
    let byte = match code {
        0..256 => u8::try_from(code).ok()?,
        256..=288 => u8::try_from(code - 256).ok()?,
        289..=322 => u8::try_from(code - 289 + 0x7F).ok()?,
        323 => 0xAD,
        _ => return None,
    };
    (char_of_byte(byte) == character).then_some(byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_character() {
        for byte in 0..=u8::MAX {
            assert_eq!(byte_of_char(char_of_byte(byte)), Some(byte));
        }
        assert_eq!(char_of_byte(b' '), 'Ġ');
        assert_eq!(char_of_byte(b'\n'), 'Ċ');
        assert_eq!(char_of_byte(0xAD), 'Ń');
        assert_eq!(byte_of_char(' '), None);
        assert_eq!(byte_of_char('€'), None);
    }
}
