// Where the __shared__ variables of all kernels of this program or shared object lie.
//
// They are static variables with the attribute noinit, which puts them in ELF sections named .noinit or .noinit.*. (The
// attribute section does not reach the static variables of templates in g++ 12.) The linker defines no symbols for the
// ends of sections with such names, so that they are looked up in the file itself: the variables in its symbol table,
// by whose names they are a function's; in its headers the whole sections, should the file have no such table.
#pragma once
#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
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
    const auto read_all = [&]<class T>(std::vector<T> all, std::uint64_t offset) {
      read(offset, all.data(), all.size() * sizeof(T));
      return all;
    };
    const auto sections = read_all(std::vector<ElfW(Shdr)>(header.e_shnum), header.e_shoff);
    const auto contents = [&]<class T>(const ElfW(Shdr) & section, T) {
      return read_all(std::vector<T>(section.sh_size / sizeof(T)), section.sh_offset);
    };
    const auto section_names = contents(sections.at(header.e_shstrndx), char{});
    for (const ElfW(Shdr) & section : sections) {
      const char* name = section_names.data() + section.sh_name;
      if (std::strcmp(name, ".noinit") != 0 && std::strncmp(name, ".noinit.", 8) != 0) continue;
      variables_.push_back({reinterpret_cast<char*>(load_address + section.sh_addr), section.sh_size, ""});
    }
    const std::vector<Variable> whole_sections = variables_;
    for (const ElfW(Shdr) & section : sections) {
      if (section.sh_type != SHT_SYMTAB) continue;
      variables_.clear();
      const auto names = contents(sections.at(section.sh_link), char{});
      for (const ElfW(Sym) & symbol : contents(section, ElfW(Sym){})) {
        char* const address = reinterpret_cast<char*>(load_address + symbol.st_value);
        const char* name = names.data() + symbol.st_name;
        if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC) functions_[address] = name;
        for (const Variable& whole : whole_sections)
          if (ELF64_ST_TYPE(symbol.st_info) == STT_OBJECT && address >= whole.begin &&
              address < whole.begin + whole.bytes)
            variables_.push_back({address, symbol.st_size, name});
      }
    }
  }

  // From here on renew() is for the blocks of this kernel. It leaves alone what is declared in another kernel, as its
  // name tells; what is declared in a function that is not a kernel may belong to any.
  void belongs_to(const void* kernel) {
    const auto [found, is_new] = of_kernel_.try_emplace(kernel);
    renewed_ = &found->second;
    if (!is_new) return;
    const auto function = functions_.find(kernel);  // _Zf, whose variables are called _ZZfE…, of a lambda in it _ZZZfE…
    const std::string own = function == functions_.end() ? "" : function->second.substr(1) + "E";
    for (const Variable& variable : variables_)
      if (variable.name.find("_kernel") == std::string::npos || variable.name.find(own) != std::string::npos)
        renewed_->push_back(variable);
  }

  // As good as new for the next block.
  void renew() const {
    for (const Variable& variable : *renewed_) renew(variable.begin, variable.bytes);
  }

  // Contents left uninitialised show: all bits set is NaN, or -1. In assembly, because the fill is no access by the
  // program, nor may it stop at AddressSanitizer's redzones between the variables.
  static void renew(char* begin, std::size_t bytes) {
    forget(begin, bytes);
    asm volatile("rep stosb" : "+D"(begin), "+c"(bytes) : "a"(0xff) : "memory");
  }

 private:
  struct Variable {
    char* begin;
    std::size_t bytes;
    std::string name;  // mangled
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

  std::vector<Variable> variables_;
  std::unordered_map<const void*, std::string> functions_;  // mangled names
  std::unordered_map<const void*, std::vector<Variable>> of_kernel_;
  std::vector<Variable>* renewed_ = nullptr;
};

}  // namespace emu
