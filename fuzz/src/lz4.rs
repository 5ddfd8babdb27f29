//! Raw LZ4 blocks, decoded byte by byte as their description has it.

/// The decoded bytes, if there are at most `most`.
pub fn decode(mut block: &[u8], most: usize) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    loop {
        let token = byte(&mut block)?;
        let literals = length(token >> 4, &mut block)?;
        let (taken, rest) = block.split_at_checked(literals)?;
        out.extend(taken);
        block = rest;
        if out.len() > most {
            return None;
        }
        // The last sequence ends with its literals.
        if block.is_empty() {
            return Some(out);
        }
        let offset = usize::from(u16::from_le_bytes([byte(&mut block)?, byte(&mut block)?]));
        let matched = length(token & 15, &mut block)? + 4;
        if offset == 0 || offset > out.len() || out.len() + matched > most {
            return None;
        }
        for _ in 0..matched {
            out.push(out[out.len() - offset]);
        }
    }
}

fn length(nibble: u8, block: &mut &[u8]) -> Option<usize> {
    let mut length = usize::from(nibble);
    if nibble == 15 {
        loop {
            let more = byte(block)?;
            length += usize::from(more);
            if more != 255 {
                break;
            }
        }
    }
    Some(length)
}

fn byte(block: &mut &[u8]) -> Option<u8> {
    let (first, rest) = block.split_first()?;
    *block = rest;
    Some(*first)
}
