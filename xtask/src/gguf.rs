//! Writing GGUF v3: the metadata and the tensor table.

/// Offsets of tensors are multiples of this.
pub(crate) const ALIGN: u64 = 32;

const UINT32: u32 = 4;
/// Element type of an array of i32.
pub(crate) const INT32: u32 = 5;
/// Element type of an array of f32.
pub(crate) const FLOAT32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// How a tensor's numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    F32,
    F16,
    Q8_0,
    Q4K,
    Q6K,
    Mxfp4,
}

impl Kind {
    /// The number in the file.
    fn code(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q6K => 14,
            Self::Mxfp4 => 39,
        }
    }

    /// Numbers in a block, and a block's bytes.
    pub(crate) fn block(self) -> (u64, u64) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q6K => (256, 210),
            Self::Mxfp4 => (32, 17),
        }
    }
}

/// One entry of the tensor table.
#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dims: Vec<u64>,
    pub(crate) kind: Kind,
}

impl Tensor {
    pub(crate) fn elements(&self) -> u64 {
        self.dims.iter().product()
    }

    pub(crate) fn bytes(&self) -> u64 {
        let (numbers, bytes) = self.kind.block();
        self.elements() / numbers * bytes
    }
}

/// The part of a file before the tensors' data, padded, and how many bytes of data follow.
pub(crate) fn header(metadata: &Metadata, tensors: &[Tensor]) -> (Vec<u8>, u64) {
    let mut header = b"GGUF".to_vec();
    header.extend(3_u32.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend(metadata.count.to_le_bytes());
    header.extend(&metadata.bytes);
    let mut offset = 0_u64;
    for tensor in tensors {
        push_str(&mut header, &tensor.name);
        header.extend((tensor.dims.len() as u32).to_le_bytes());
        tensor.dims.iter().for_each(|dim| header.extend(dim.to_le_bytes()));
        header.extend(tensor.kind.code().to_le_bytes());
        header.extend(offset.to_le_bytes());
        offset += tensor.bytes().next_multiple_of(ALIGN);
    }
    header.resize((header.len() as u64).next_multiple_of(ALIGN) as usize, 0);
    (header, offset)
}

/// The key-value section, as it grows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metadata {
    count: u64,
    bytes: Vec<u8>,
}

impl Metadata {
    fn key(&mut self, key: &str, kind: u32) {
        self.count += 1;
        push_str(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, key: &str, value: u32) {
        self.key(key, UINT32);
        self.bytes.extend(value.to_le_bytes());
    }

    pub(crate) fn f32(&mut self, key: &str, value: f32) {
        self.key(key, FLOAT32);
        self.bytes.extend(value.to_le_bytes());
    }

    pub(crate) fn bool(&mut self, key: &str, value: bool) {
        self.key(key, BOOL);
        self.bytes.push(u8::from(value));
    }

    pub(crate) fn string(&mut self, key: &str, value: &str) {
        self.key(key, STRING);
        push_str(&mut self.bytes, value);
    }

    pub(crate) fn strings(&mut self, key: &str, values: &[String]) {
        self.array_head(key, STRING, values.len());
        values.iter().for_each(|value| push_str(&mut self.bytes, value));
    }

    pub(crate) fn array(&mut self, key: &str, kind: u32, values: impl ExactSizeIterator<Item = [u8; 4]>) {
        self.array_head(key, kind, values.len());
        values.for_each(|value| self.bytes.extend(value));
    }

    fn array_head(&mut self, key: &str, kind: u32, len: usize) {
        self.key(key, ARRAY);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((len as u64).to_le_bytes());
    }
}

fn push_str(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}
