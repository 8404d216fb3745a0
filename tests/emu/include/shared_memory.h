// Where the __shared__ variables of all kernels of this program or shared object lie.
//
// They are static variables with the attribute noinit, which puts them in ELF sections named .noinit or .noinit.*. (The
// attribute section does not reach the static variables of templates in g++ 12.) The linker defines no symbols for the
// ends of sections with such names, so that they are looked up in the headers of the file itself.
#pragma once
#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "happens_before.h"

#define EMU_SHARED_VARIABLE static __attribute__((noinit))

namespace [[gnu::visibility("hidden")]] emu {

class SharedMemory {
 public:
  SharedMemory() {
    const auto [path, load_address] = this_object();
    std::ifstream file(path, std::ios::binary);
    const auto read = [&](std::uint64_t offset, void* to, std::size_t bytes) {
      if (!file.seekg(static_cast<std::streamoff>(offset)).read(static_cast<char*>(to), std::streamsize(bytes))) {
        throw std::runtime_error("cannot read the section headers of " + path);
      }
    };
    ElfW(Ehdr) header;
    read(0, &header, sizeof header);
    std::vector<ElfW(Shdr)> sections(header.e_shnum);
    read(header.e_shoff, sections.data(), sections.size() * sizeof(ElfW(Shdr)));
    std::vector<char> names(sections.at(header.e_shstrndx).sh_size);
    read(sections[header.e_shstrndx].sh_offset, names.data(), names.size());
    for (const ElfW(Shdr) & section : sections) {
      const char* name = names.data() + section.sh_name;
      if (std::strcmp(name, ".noinit") != 0 && std::strncmp(name, ".noinit.", 8) != 0) continue;
      ranges_.push_back({reinterpret_cast<char*>(load_address + section.sh_addr), section.sh_size});
    }
  }

  // As good as new for the next block. Contents left uninitialised show: all bits set is NaN, or -1. In assembly,
  // because the fill is no access by the program, nor may it stop at AddressSanitizer's redzones between the variables.
  void renew() const {
    for (auto [begin, bytes] : ranges_) {
      forget(begin, bytes);
      asm volatile("rep stosb" : "+D"(begin), "+c"(bytes) : "a"(0xff) : "memory");
    }
  }

 private:
  struct Range {
    char* begin;
    std::size_t bytes;
  };
  struct Object {
    std::string path;
    std::uintptr_t load_address;
  };

  static Object this_object() {
    Object found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* result) {
          static const char here = 0;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const ElfW(Phdr) & segment = info->dlpi_phdr[i];
            const std::uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
            if (segment.p_type != PT_LOAD || reinterpret_cast<std::uintptr_t>(&here) - begin >= segment.p_memsz) {
              continue;
            }
            *static_cast<Object*>(result) = {*info->dlpi_name ? info->dlpi_name : "/proc/self/exe", info->dlpi_addr};
            return 1;
          }
          return 0;
        },
        &found);
    return found;
  }

  std::vector<Range> ranges_;
};

}  // namespace emu
